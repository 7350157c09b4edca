"""Turns activations that stand alone into integers: Relu, Clip, LeakyRelu, PRelu, Abs, Neg.

Before: `q = QuantizeLinear(Relu(DequantizeLinear(x)))`.
After: `q = requantize(max(x - z, 0))`, all integers. (Behind an operator with a requantisation of
its own they need no node: the limits of its Clip do it.)
Condition: the operand and the result are quantized; a slope is constant.
Law: every element equals `grid.requantize` of the exact value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.grid import Dyadic, dyadic, requantize
from onnx_intq.lowering import CannotLowerError, Site, activation_limits, lower
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass

OPS = ("Relu", "Clip", "LeakyRelu", "PRelu", "Abs", "Neg")


@dataclass(frozen=True, kw_only=True)
class IntegerizeActivation(Pass):
    """Lower activations made of straight lines."""

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        return lower(model, ctx, OPS, _emit)


def _emit(site: Site, builder: Builder) -> Value:
    x, node = site.operand(0), site.node
    first, last = site.first, site.last
    q = x.centred(builder)
    if node.op in {"Relu", "Clip"}:
        first, last = activation_limits(node, site.result)
    elif node.op in {"Abs", "Neg"}:
        q = np.abs(q) if node.op == "Abs" else -q
    factor = x.scale / site.result.scale
    rising = _requantized(site, q, np.asarray(factor), first, last)
    if node.op in {"LeakyRelu", "PRelu"}:
        falling = _requantized(site, q, factor * _slope(site), first, last)
        rising = np.where(q < 0, falling, rising)
    return builder.value(rising.astype(site.result.grid.dtype), first, last)


def _requantized(site: Site, q: Any, factor: Any, first: int, last: int) -> Any:
    found = dyadic(np.abs(factor), 62 - site.result.grid.bits)
    signed = Dyadic(found.b * np.sign(factor).astype(np.int64), found.c)
    return requantize(q, signed, zero_point=site.result.zero_point, low=first, high=last)


def _slope(site: Site) -> Any:
    if site.node.op == "LeakyRelu":
        return np.asarray(site.node.attrs.get("alpha", 0.01))
    slope = site.values(1)
    if slope is None:
        raise CannotLowerError("its slope is computed at run time")
    return slope.astype(np.float64)
