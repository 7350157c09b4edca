"""Turns quantized convolutions into ConvInteger and an integer requantisation.

Before: `q = QuantizeLinear(Relu(Conv(DequantizeLinear(x), DequantizeLinear(w), b)))`.
After: `q = Cast(Clip(Div(Add(Mul(ConvInteger(x, w), m), r), d)))`, all integers.
Weights are stored as uint8 with zero point 128, activations as int8: onnxruntime's fast form. Bias,
zero points, rounding and the activation are folded into r and the limits of Clip.
Condition: weights are constant, inputs have 8 bits.
Law: every element equals `grid.requantize` of the exact sum, by a multiplier that is at most
`requantization.PRECISION` off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.lowering import CannotLowerError, Site, lower
from onnx_intq.products import bias, step, unsigned, weight
from onnx_intq.requantization import emit
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class IntegerizeConv(Pass):
    """Lower Conv."""

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        return lower(model, ctx, {"Conv"}, _emit)


def _emit(site: Site, builder: Builder) -> Value:
    x, w = site.operand(0), weight(site.node.inputs[1])
    if x.grid.bits != 8:
        raise CannotLowerError(f"its input has {x.grid.bits} bits; ConvInteger takes 8")
    if w.scales.size > 1 and w.axis != 0:
        raise CannotLowerError("its weight has scales along another axis than output channels")
    stored, zero_point = unsigned(w.centred)
    rows = w.centred.reshape(len(stored), -1)
    inputs = [
        x.tensor,
        builder.constant(stored, np.uint8),
        builder.constant(np.asarray(x.zero_point), x.grid.dtype),
        builder.constant(np.asarray(zero_point), np.uint8),
    ]
    chosen = step(site, x, w, rows, bias(site))
    shape = site.node.outputs[0].shape
    acc = builder.node("ConvInteger", inputs, np.int32, shape, **site.node.attrs)
    value = builder.value(acc, int(chosen.low.min()), int(chosen.high.max()))
    ones = (1,) * (w.centred.ndim - 2)
    return emit(value, chosen, site.result.grid, (len(stored), *ones))
