"""Turns quantized products of two tensors, and products with a constant, into integers.

Before: `q = QuantizeLinear(Mul(DequantizeLinear(a), DequantizeLinear(b)))`.
After: `q = requantize((a - za) * (b - zb))`, all integers; a constant factor or divisor goes into
the requantisation's multiplier, per channel.
Condition: the product is no swish, the divisor no tensor: these are other passes'.
Law: every element equals `grid.requantize` of the exact product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.composites import swish
from onnx_intq.grid import Dyadic, dyadic, requantize
from onnx_intq.lowering import CannotLowerError, Site, constant_values, lower
from onnx_intq.nonlinear import multiplier_bits, requantized
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class IntegerizeMul(Pass):
    """Lower Mul, and Div by a constant."""

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        return lower(model, ctx, {"Mul", "Div"}, _emit, where=_is_meant)


def _is_meant(node: gs.Node) -> bool:
    """Quotients by a tensor, and x * Sigmoid(x), are other passes'."""
    if node.op == "Mul":
        return swish(node) is None
    return constant_values(node.inputs[1]) is not None


def _emit(site: Site, builder: Builder) -> Value:
    places = [i for i in range(2) if site.values(i) is None]
    operands = [site.operand(i) for i in places]
    if not operands:
        raise CannotLowerError("both its inputs are constant; run fold_constants before")
    units = np.asarray(np.prod([x.scale for x in operands]) * _constant(site, places))
    product = operands[0].centred(builder)
    for other in operands[1:]:
        product = product * other.centred(builder)
    if units.ndim == 0 and units > 0:
        return requantized(site, builder, product, float(units))
    multipliers, bits = units / site.result.scale, multiplier_bits(product)
    found = dyadic(np.abs(multipliers), 62 - site.result.grid.bits, bits)
    signed = Dyadic(found.b * np.sign(multipliers).astype(np.int64), found.c)
    limits = {"zero_point": site.result.zero_point, "low": site.first, "high": site.last}
    result = requantize(product, signed, **limits)
    return builder.value(result.astype(site.result.grid.dtype), site.first, site.last)


def _constant(site: Site, places: list[int]) -> np.ndarray:
    if len(places) == 2:
        return np.ones(())
    values = site.values(1 - places[0])
    assert values is not None  # noqa: S101  `places` holds those that are
    factors = values.astype(np.float64)
    if site.node.op == "Div":
        if not (factors != 0).all():
            raise CannotLowerError("it divides by 0")
        factors = 1 / factors
    return factors
