"""Turns quantized sums and differences into integers with one common exponent and one rounding.

Before: `q = QuantizeLinear(Relu(Add(DequantizeLinear(a), DequantizeLinear(b))))`.
After: `q = Cast(Clip(Div(a * m + b * n + r, d)))`, all integers.
A constant addend is held in 2^-14 steps of the result. Q-ASR rounds each addend before the sum,
which puts a quarter of the results one step off.
Condition: addends are quantized or constant.
Law: every element equals `grid.weighted_sum`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.combination import Term, emit
from onnx_intq.lowering import CannotLowerError, Site, lower
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass

FRACTION_BITS = 14
"""Of a constant addend, in steps of the result: 2^-15 of a step is lost."""


@dataclass(frozen=True, kw_only=True)
class IntegerizeAdd(Pass):
    """Lower Add and Sub."""

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        return lower(model, ctx, {"Add", "Sub"}, _emit)


def _emit(site: Site, builder: Builder) -> Value:
    signs = (1, -1 if site.node.op == "Sub" else 1)
    return emit(builder, [_term(site, builder, i, sign) for i, sign in enumerate(signs)], site)


def _term(site: Site, builder: Builder, index: int, sign: int) -> Term:
    values = site.values(index)
    if values is None:
        found = site.operand(index)
        factor = sign * found.scale / site.result.scale
        return Term(value=found.stored(builder), zero_point=found.zero_point, factor=factor)
    steps = np.rint(values.astype(np.float64) / site.result.scale * 2.0**FRACTION_BITS)
    if not np.abs(steps).max(initial=0) < 1 << 31:
        raise CannotLowerError("it adds a constant far outside the range of its result")
    integers = steps.astype(np.int64)
    constant = builder.constant(integers, np.int32)
    value = builder.value(constant, int(integers.min()), int(integers.max()))
    return Term(value=value, zero_point=0, factor=sign * 2.0**-FRACTION_BITS)
