"""Turns casts of truth values and integers to float, as masks have them, into integers on a grid.

Before: `q = QuantizeLinear(Cast(mask))`, mask bool.
After: `q = Where(mask, 127, -128)`: the integers of 1 and 0.
Integers are requantised: `q = requantize(length)`. A Cast from float32 to float32 does nothing.
Condition: the result is float32.
Law: every element equals `grid.requantize` of the integer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.grid import dyadic, requantize
from onnx_intq.lowering import CannotLowerError, Site, is_float, lower
from onnx_intq.moving import constant_on, regrid
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class IntegerizeCast(Pass):
    """Lower Cast to float32."""

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        for node in model.nodes:
            if node.op == "Cast" and is_float(node) and not _to_float(node):
                name = np.dtype(node.outputs[0].dtype).name
                ctx.remain(node, f"it casts floats to {name}; only casts to float32 can be lowered")
        return lower(model, ctx, {"Cast"}, _emit, where=_to_float)


def _to_float(node: gs.Node) -> bool:
    return bool(node.outputs[0].dtype == np.float32)


def _emit(site: Site, builder: Builder) -> Value:
    source = site.node.inputs[0]
    if source.dtype == np.float32:
        x = site.operand(0)
        tensor = builder.node("Identity", [x.tensor], x.grid.dtype, source.shape)
        return regrid(replace(x, tensor=tensor), site.result, builder, site.first, site.last)
    if source.dtype == np.bool_:
        return _truth(site, builder)
    if source.dtype is None or np.dtype(source.dtype).kind not in "iu":
        raise CannotLowerError(f"it casts {source.name!r}, which is neither bool nor an integer")
    return _number(site, builder)


def _truth(site: Site, builder: Builder) -> Value:
    """The integers of 1 and 0; onnxruntime 1.31 has no Where for 16 bits."""
    dtype, source = site.result.grid.dtype, site.node.inputs[0]
    work = np.dtype(np.int32) if dtype.itemsize > 1 else dtype
    ends = [
        constant_on(np.asarray(value), site.result, builder, site.first, site.last).values
        for value in (1.0, 0.0)
    ]
    inputs = [source, *(builder.constant(end, work) for end in ends)]
    chosen = builder.value(builder.node("Where", inputs, work, source.shape), site.first, site.last)
    return builder.value(chosen.astype(dtype), site.first, site.last)


def _number(site: Site, builder: Builder) -> Value:
    """Integers outside of the result's range are cut off first, so that the product fits int64."""
    source, result = site.node.inputs[0], site.result
    limits = np.iinfo(source.dtype)
    low, high = math.floor(result.low) - 1, math.ceil(result.high) + 1
    q: Any = builder.value(source, int(limits.min), int(limits.max))
    q = np.clip(q, low, high)
    multiplier = dyadic(1 / result.scale, 62 - result.grid.bits)
    rounded = requantize(
        q, multiplier, zero_point=result.zero_point, low=site.first, high=site.last
    )
    return builder.value(rounded.astype(result.grid.dtype), site.first, site.last)
