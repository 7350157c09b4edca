"""Turns LayerNormalization into integers: exact sums, an exact integer square root, one division.

Before: `q = QuantizeLinear(LayerNormalization(DequantizeLinear(x), gamma, beta))`.
After: `q = (kernels.normalize(x) * b + offset) >> c`, all integers; gamma and the result's scale
are in b and c, beta and its zero point in the offset, per channel.
Condition: the last axis alone is normalised, gamma and beta are constant, mean and deviation are
not read.
Law: every element equals `nonlinear.onto_channels` of the kernel's result, which is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.kernels.exponential import Mode
from onnx_intq.kernels.layer_norm import normalize
from onnx_intq.lowering import CannotLowerError, Site, lower
from onnx_intq.nonlinear import mode_named, onto_channels
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class IntegerizeLayerNorm(Pass):
    """Lower LayerNormalization.

    Attributes:
        mode: "poly", or "paper": without epsilon, mean and root rounded; "lut" is "poly".
        target: As for `integerize_nonlinear`.
    """

    mode: str = "poly"
    target: str = "integer"

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        mode = mode_named(self.mode)

        def emit(site: Site, builder: Builder) -> Value:
            return _emit(site, builder, mode)

        return lower(model, ctx, {"LayerNormalization"}, emit, target=self.target)


def _emit(site: Site, builder: Builder, mode: Mode) -> Value:
    gamma, beta, node = site.values(1), site.values(2), site.node
    if site.index != 0:
        raise CannotLowerError("its mean or deviation is read")
    if gamma is None or (beta is None and len(node.inputs) > 2 and not node.inputs[2].is_empty()):
        raise CannotLowerError("its scale or bias is computed at run time")
    x, shape = site.operand(0), node.inputs[0].shape
    axis = node.attrs.get("axis", -1)
    if shape is None or axis not in {-1, len(shape) - 1}:
        raise CannotLowerError(f"it normalises from axis {axis} on; expected the last axis alone")
    length = shape[-1] if isinstance(shape[-1], int) else gamma.size
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    y, step = normalize(x.centred(builder), x.scale, length, epsilon, mode)
    result = site.result
    integers = onto_channels(
        y,
        gamma.astype(np.float64) * (step / result.scale),
        np.zeros(()) if beta is None else beta.astype(np.float64) / result.scale,
        zero_point=result.zero_point,
        low=site.first,
        high=site.last,
    )
    return builder.value(integers.astype(result.grid.dtype), site.first, site.last)
