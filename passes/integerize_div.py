"""Turns quantized quotients of two tensors, and of a constant and a tensor, into integers.

Before: `q = QuantizeLinear(Div(DequantizeLinear(a), DequantizeLinear(b)))`.
After: `q = requantize(((a - za) * 2^14 + |b - zb| / 2) / (b - zb))`, all integers.
A divisor of 0 counts as one step: integers have no infinity, and onnxruntime stops at a division
by zero. A constant dividend has 16 bits.
Condition: the divisor is computed; quotients by a constant are products.
Law: every element equals `grid.requantize` of the result of `kernels.division.divide`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.kernels.division import divide
from onnx_intq.lowering import CannotLowerError, Site, constant_values, lower
from onnx_intq.nonlinear import requantized
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass

CONSTANT_BITS = 15
"""Of the largest constant: times 2^15 it is 2^30, and a divisor of 16 bits leaves 14."""


@dataclass(frozen=True, kw_only=True)
class IntegerizeDiv(Pass):
    """Lower Div by a tensor."""

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        return lower(model, ctx, {"Div"}, _emit, where=_divides_by_a_tensor)


def _divides_by_a_tensor(node: gs.Node) -> bool:
    return constant_values(node.inputs[1]) is None


def _emit(site: Site, builder: Builder) -> Value:
    constant, b = site.values(0), site.operand(1)
    divisor = b.centred(builder)
    if constant is not None:
        dividend, scale = _integers(constant)
        return requantized(site, builder, *divide(dividend, scale, divisor, b.scale, CONSTANT_BITS))
    a = site.operand(0)
    return requantized(site, builder, *divide(a.centred(builder), a.scale, divisor, b.scale))


def _integers(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], float]:
    """A constant as integers up to 2^15 in magnitude, and their scale."""
    largest = float(np.abs(values).max(initial=0.0))
    if not 0 < largest < np.inf:
        raise CannotLowerError("it divides a constant without a finite value other than 0")
    scale = largest / (1 << CONSTANT_BITS)
    return np.rint(values.astype(np.float64) / scale).astype(np.int64), scale
