"""Turns quantized means and sums into integer sums and one requantisation.

Before: `q = QuantizeLinear(ReduceMean(DequantizeLinear(x)))`.
After: `q = requantize(ReduceSum(x))`, all integers: the number of elements is in the multiplier.
Over a length that is not fixed, the sum is divided by it first, to 2^-12 of a step.
AveragePool becomes a depthwise ConvInteger with ones for 8 bits, a sum of slices for 16.
Condition: a length that is not fixed is at most `trace.LONGEST`, several together are 2^31.
Law: every sum, and mean over fixed lengths, equals `grid.requantize` of the exact sum; a mean over
others that of `kernels.average` with 12 fractional bits, which is at most 2^-13 input steps off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant
from onnx_intq.grid import Dyadic, dyadic, requantize
from onnx_intq.kernels.average import average
from onnx_intq.lowering import CannotLowerError, Operand, Site, lower
from onnx_intq.pooling import Window, elements, sizes, taps, window
from onnx_intq.qdq import has_input
from onnx_intq.requantization import Step, emit
from onnx_intq.trace import LONGEST, Builder, Value, bounded
from onnx_intq.transform import Context, Pass

OPS = {"ReduceMean", "ReduceSum", "GlobalAveragePool", "AveragePool"}
FRACTION_BITS = 12
"""Of a mean over a length that is not fixed: 2^16 + 12 bits stay below 2^31."""
MOST = 1 << 31
"""Elements that are summed over several such lengths: more do not fit a machine's memory."""


@dataclass(frozen=True, kw_only=True)
class IntegerizeMean(Pass):
    """Lower ReduceMean, ReduceSum, AveragePool and GlobalAveragePool."""

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        return lower(model, ctx, OPS, _emit)


@dataclass(frozen=True, kw_only=True)
class _Sum:
    """Sums of integers.

    Attributes:
        total: The sums; real = (total - added * zero_point) * scale.
        added: How many stored integers each has.
        count: What they are divided by: an int, an int64 array that broadcasts, or a Value.
    """

    total: Value
    added: int | Value
    count: Any


def _emit(site: Site, builder: Builder) -> Value:
    x = site.operand(0)
    if site.node.op == "AveragePool":
        found = _pooled(site, builder, x)
    else:
        found = _reduced(site, builder, x)
    fixed = isinstance(found.added, int) and not isinstance(found.count, Value)
    reach = max(abs(found.total.low), abs(found.total.high)) * 2
    return (_requantized if fixed and reach < 1 << 31 else _divided)(site, x, found)


def _requantized(site: Site, x: Operand, found: _Sum) -> Value:
    """The count is in the multiplier: one rounding."""
    count, result = np.atleast_1d(np.asarray(found.count, np.int64)), site.result
    multiplier = dyadic(x.scale / (count.reshape(-1) * result.scale), 62 - result.grid.bits)
    same = np.ones(count.size, np.int64)
    step = Step(
        multiplier=Dyadic(multiplier.b, multiplier.c),
        bias=same * -x.zero_point * found.added,
        low=same * found.total.low,
        high=same * found.total.high,
        zero_point=result.zero_point,
        first=site.first,
        last=site.last,
    )
    return emit(found.total, step, result.grid, count.shape if count.size > 1 else ())


def _divided(site: Site, x: Operand, found: _Sum) -> Value:
    """The sum is divided by its count to `FRACTION_BITS`, then requantised."""
    q: Any = found.total
    if x.zero_point and (isinstance(found.added, Value) or found.added):
        q = q - found.added * x.zero_point
    factor, result, builder = x.scale / site.result.scale, site.result, found.total.builder
    if site.node.op != "ReduceSum":
        ends = [(end - x.zero_point) << FRACTION_BITS for end in (x.grid.low, x.grid.high)]
        # A mean lies between the lowest and the highest of what it is of, and so do these ends.
        q = bounded(average(q, found.count, FRACTION_BITS), *ends)
        factor = math.ldexp(factor, -FRACTION_BITS)
    multiplier = dyadic(factor, 62 - result.grid.bits)
    if max(-q.low, q.high) >= 1 << 31:
        q = np.clip(q, *_window(site, int(multiplier.b), int(multiplier.c)))
    limits = {"low": site.first, "high": site.last}
    rounded = requantize(q, multiplier, zero_point=result.zero_point, **limits)
    return builder.value(rounded.astype(result.grid.dtype), site.first, site.last)


def _window(site: Site, b: int, c: int) -> tuple[int, int]:
    """Sums outside become the lowest or the highest result; inside, times b, they fit int64."""
    low, high = site.first - site.result.zero_point - 1, site.last - site.result.zero_point + 1
    return (low << c) // max(b, 1), -((-high << c) // max(b, 1))


def _reduced(site: Site, builder: Builder, x: Operand) -> _Sum:
    node, axes = site.node, _axes(site.node)
    sizes = [node.inputs[0].shape[axis] for axis in axes]
    fixed = all(isinstance(size, int) for size in sizes)
    most = math.prod(size if isinstance(size, int) else LONGEST for size in sizes)
    most = most if fixed else min(most, MOST)
    low, high = most * min(x.grid.low, 0), most * max(x.grid.high, 0)
    dtype = np.int32 if max(-low, high) < 1 << 31 else np.int64
    keep = 1 if node.op == "GlobalAveragePool" else node.attrs.get("keepdims", 1)
    inputs = [x.stored(builder).astype(dtype), builder.constant(axes, np.int64)]
    shape = node.outputs[0].shape
    total = builder.value(builder.node("ReduceSum", inputs, dtype, shape, keepdims=keep), low, high)
    added = most if fixed else elements(builder, x.tensor, axes, most)
    # onnxruntime stops at an integer division by 0: the mean of nothing is 0.
    count = added if fixed else np.maximum(cast(Any, added), 1)
    return _Sum(total=total, added=added, count=1 if node.op == "ReduceSum" else count)


def _axes(node: gs.Node) -> list[int]:
    """The axes that are summed, from 0."""
    shape, given = node.inputs[0].shape, constant(node, 1)
    if shape is None:
        raise CannotLowerError(f"the rank of its input {node.inputs[0].name!r} is unknown")
    if node.op == "GlobalAveragePool":
        return list(range(2, len(shape)))
    if has_input(node, 1) and given is None:
        raise CannotLowerError("its axes are computed at run time")
    if given is not None and given.size:
        return sorted(int(axis) % len(shape) for axis in given.reshape(-1))
    if node.attrs.get("noop_with_empty_axes", 0):
        raise CannotLowerError("it has no axes and does nothing; run drop_identity before")
    return list(range(len(shape)))


def _pooled(site: Site, builder: Builder, x: Operand) -> _Sum:
    where, shape = window(site.node), site.node.outputs[0].shape
    channels = site.node.inputs[0].shape[1] if site.node.inputs[0].shape is not None else None
    count = _counts(site, builder, where, x.tensor)
    if x.grid.bits > 8 or not isinstance(channels, int):
        slices = taps(x.stored(builder), where, x.zero_point, shape)
        return _Sum(total=_added(slices), added=len(slices), count=count)
    places = math.prod(where.kernel)
    inputs = [
        x.tensor,
        builder.constant(np.ones((channels, 1, *where.kernel)), np.uint8),
        builder.constant(x.zero_point, x.grid.dtype),
    ]
    attrs = {"group": channels, "strides": list(where.strides), "dilations": list(where.dilations)}
    attrs |= {"kernel_shape": list(where.kernel), "pads": [*where.begin, *where.end]}
    acc = builder.node("ConvInteger", inputs, np.int32, shape, **attrs)
    ends = [places * (end - x.zero_point) for end in (x.grid.low, x.grid.high)]
    return _Sum(total=builder.value(acc, *ends), added=0, count=count)


def _counts(site: Site, builder: Builder, where: Window, tensor: gs.Tensor) -> Any:
    """What the sums of windows are divided by: fewer places at the edges without padding."""
    shape, places = site.node.inputs[0].shape, math.prod(where.kernel)
    if not where.padded or site.node.attrs.get("count_include_pad", 0):
        return places
    rank = len(where.kernel)
    if shape is not None and all(isinstance(size, int) for size in shape[2:]):
        found = where.counts(shape[2:])
        return places if (found == places).all() else found.reshape(1, 1, *found.shape)
    inputs = [
        builder.constant([1, 1], np.int64),
        sizes(builder, tensor, range(2, 2 + rank)),
    ]
    full = builder.node("Concat", inputs, np.int64, [2 + rank], axis=0)
    ones = builder.node("Expand", [builder.constant(1, np.int32), full], np.int32)
    pooled = site.node.outputs[0].shape
    shape = None if pooled is None else [1, 1, *pooled[2:]]
    slices = taps(builder.value(ones, 1, 1), where, 0, shape)
    return cast(Any, np.maximum(cast(Any, _added(slices)), 1))


def _added(slices: Sequence[Any]) -> Value:
    found: Value = sum(slices[1:], start=slices[0])
    return found
