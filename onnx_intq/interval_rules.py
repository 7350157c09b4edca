"""The box of an operator's exact results, from the boxes of what it reads.

Exact means before they are stored in their type. A rule answers with a box, or in words why it has
none. Boxes keep their channels through sums of products with constant weights and through
elementwise operators; elsewhere their hull goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant
from onnx_intq.interval_arithmetic import (
    Box,
    Interval,
    absolute,
    box,
    clipped,
    corners,
    growing,
    negative,
    signed,
    truncated,
    union,
    weighted,
    wrapped,
)

LARGEST_SIZE = (1 << 31) - 1
"""No tensor has more elements, so sizes, places and sums have no more."""
TRUTH = (0, 1)


@dataclass(frozen=True)
class Place:
    """A node and the boxes of what it reads; a `KeyError` tells that one has none.

    Attributes:
        node: The node.
        known: `id` of a tensor -> its box.
        limits: Of the type of its first integer output.
    """

    node: gs.Node
    known: Mapping[int, Box]
    limits: Interval

    def box(self, tensor: gs.Tensor) -> Box:
        """The box of a tensor."""
        return self.known[id(tensor)]

    def __getitem__(self, index: int) -> Box:
        """The box of input `index`, to calculate with."""
        return self.box(self.node.inputs[index]).exact()

    def hull(self, index: int) -> Box:
        """One interval for all of input `index`."""
        return self.box(self.node.inputs[index]).hull()

    def ends(self, index: int) -> Interval:
        """The lowest and highest value of input `index`."""
        return self.box(self.node.inputs[index]).ends

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        return index < len(self.node.inputs) and not self.node.inputs[index].is_empty()

    def all(self) -> list[Box]:
        """The boxes of all inputs, to calculate with."""
        return [self[index] for index in range(len(self.node.inputs))]

    def rank(self, index: int) -> int | None:
        """The number of axes of an input, None if it is unknown."""
        shape = self.node.inputs[index].shape
        return None if shape is None else len(shape)

    def size(self, index: int, axis: int) -> int | None:
        """The length of an axis of an input, None if it is unknown before run time."""
        shape = self.node.inputs[index].shape
        size = shape[axis] if shape is not None else None
        return size if isinstance(size, int) else None


Rule = Callable[[Place], Box | str]
EXACT_IN_FLOAT64 = 1 << 53
"""onnxruntime 1.31 computes ReduceSum and Mod with `fmod` of integers in float64."""
ROUNDED = "may pass 2^53, above which onnxruntime rounds"
INT32, INT64 = ((-(1 << (bits - 1)), (1 << (bits - 1)) - 1) for bits in (32, 64))
MISTAKEN = "may leave int32, beyond which onnxruntime compares int64 wrongly"
"""1.31 on x86-64, where bit 31 differs and those above are equal: it has Max(3 << 30, 0) = 0."""
UNKNOWN_SIZE = "adds up along an axis of unknown length"


def _product(place: Place) -> Box:
    if place.node.inputs[0] is not place.node.inputs[1]:
        return corners(mul, place[0], place[1])
    size = absolute(place[0])
    return Box(size.low * size.low, size.high * size.high)


def _quotient(place: Place) -> Box | str:
    """ONNX's Div of integers truncates."""
    divisor = place[1]
    if ((divisor.low <= 0) & (divisor.high >= 0)).any():
        return "may divide by 0"
    return corners(truncated, place[0], divisor)


def _remainder(place: Place) -> Box | str:
    """Its sign is the divisor's, with `fmod` the dividend's."""
    dividend, divisor = place.ends(0), place.ends(1)
    if divisor[0] <= 0:
        return "may have a divisor below 1"
    most = divisor[1] - 1
    if place.node.attrs.get("fmod") and max(most, *map(abs, dividend)) > EXACT_IN_FLOAT64:
        return ROUNDED
    return box(-most if place.node.attrs.get("fmod") and dividend[0] < 0 else 0, most)


def _clip(place: Place) -> Box:
    found = place[0]
    if place.has(1):
        found = growing(np.maximum, found, place[1])
    if place.has(2):
        found = growing(np.minimum, found, place[2])
    return found


def _compared(rule: Rule, place: Place) -> Box | str:
    """By an operator that onnxruntime computes from comparisons of its own."""
    values = place.node.inputs[:1] if place.node.op.startswith("Reduce") else place.node.inputs
    given = [place.box(tensor).hull() for tensor in values if not tensor.is_empty()]
    right = place.limits != INT64 or union(*given, box(*INT32)).ends == INT32
    return rule(place) if right else MISTAKEN


def _shift(place: Place) -> Box | str:
    if place.ends(1)[1] >= place.limits[1].bit_length():
        return "may shift by all bits of its type"
    left = place.node.attrs["direction"] == "LEFT"
    return corners(np.left_shift if left else np.right_shift, place[0], place[1])


def _reduce_sum(place: Place) -> Box | str:
    sizes = _reduced(place)
    if not sizes:
        return place[0]
    found = _added(place, place.ends(0), sizes)
    if isinstance(found, str) or max(map(abs, found.ends)) <= EXACT_IN_FLOAT64:
        return found
    return UNKNOWN_SIZE if None in sizes else ROUNDED


def _reduced(place: Place) -> list[int | None]:
    """The lengths of the axes that are added up."""
    axes, rank = constant(place.node, 1), place.rank(0)
    if place.has(1) and (axes is None or axes.size):
        return [None] if axes is None else [place.size(0, int(axis)) for axis in axes]
    if place.node.attrs.get("noop_with_empty_axes"):
        return []
    return [None] if rank is None else [place.size(0, axis) for axis in range(rank)]


def _added(place: Place, values: Interval, sizes: Sequence[int | None]) -> Box | str:
    """The sums of values along axes, of any length where that is unknown."""
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        low, high = (end * math.prod(known) for end in values)
        return box(low, high)
    low, high = min(0, values[0] * LARGEST_SIZE), max(0, values[1] * LARGEST_SIZE)
    return box(low, high) if place.limits[0] <= low and high <= place.limits[1] else UNKNOWN_SIZE


def _conv(place: Place) -> Box | str:
    """Of each output channel. Padding is the zero point, which adds 0."""
    weights = constant(place.node, 1)
    zero = constant(place.node, 3) if place.has(3) else np.zeros((), np.int64)
    if weights is None or zero is None:
        return "has weights that are not constant"
    centred = signed(weights) - signed(zero).reshape(-1, *[1] * (weights.ndim - 1))
    values = union(_centred(place, 0, 2), box(0, 0)).ends
    sums = weighted(centred.reshape(len(centred), math.prod(centred.shape[1:])), values, -1)
    shape = -1, *[1] * (weights.ndim - 2)
    return Box(sums.low.reshape(shape), sums.high.reshape(shape))


def _matmul(place: Place) -> Box | str:
    """The constant operand, if any, counts with its own values: of each row or column."""
    for index, axis in ((1, -2), (0, -1)):
        values = constant(place.node, index)
        zero = constant(place.node, index + 2) if place.has(index + 2) else np.zeros(1, np.int64)
        if values is None or zero is None:
            continue
        zero = signed(zero)
        if index == 0 and zero.ndim == 1 and zero.size > 1:
            zero = zero[:, None]
        centred = signed(values) - zero
        other = _centred(place, 1 - index, 3 - index).ends
        sums = weighted(centred, other, axis if centred.ndim > 1 else -1)
        return sums if (place.rank(1 - index) or 1) > 1 else sums.hull()
    products = corners(mul, _centred(place, 0, 2), _centred(place, 1, 3)).ends
    size = place.size(0, -1)
    if size is None:
        size = place.size(1, -2 if (place.rank(1) or 0) > 1 else -1)
    return _added(place, products, [size])


def _centred(place: Place, index: int, zero: int) -> Box:
    """All of an input less its zero point."""
    zeros = place.hull(zero) if place.has(zero) else box(0, 0)
    return growing(np.add, place.hull(index), negative(zeros))


def _running_sum(place: Place) -> Box | str:
    axis = constant(place.node, 1)
    size = None if axis is None else place.size(0, int(axis.item()))
    found = _added(place, place.ends(0), [size])
    return found if isinstance(found, str) else union(found, box(0, 0))


def _filled(place: Place) -> Box:
    value = int(place.node.attrs["value"].values.item())
    return box(value, value)


def _padded(place: Place) -> Box:
    if place.node.attrs.get("mode", "constant") != "constant":
        return place.hull(0)
    return union(place.hull(0), place.hull(2) if place.has(2) else box(0, 0))


def _cast(place: Place) -> Box:
    """Only a wrap that keeps all values in order is no overflow."""
    return box(*TRUTH) if place.limits == TRUTH else wrapped(place[0], place.limits)


def _constantly(interval: Interval, _: Place) -> Box:
    return box(*interval)


TRUTHS = "Equal Greater GreaterOrEqual Less LessOrEqual Not And Or Xor EyeLike"
MOVES = """Reshape Flatten Transpose Squeeze Unsqueeze Slice Gather GatherElements GatherND
    Split Expand Tile Compress DepthToSpace SpaceToDepth MaxPool GlobalMaxPool Unique TopK"""
COMPARED: Mapping[str, Rule] = {
    "Clip": _clip,
    "Max": lambda place: growing(np.maximum, *place.all()),
    "Min": lambda place: growing(np.minimum, *place.all()),
    "ReduceMax": lambda place: place.hull(0),
    "ReduceMin": lambda place: place.hull(0),
    "Relu": lambda place: growing(np.maximum, place[0], box(0, 0)),
    "Sign": lambda place: clipped(place[0], -1, 1),
}
PLACES = "Shape Size ArgMax ArgMin NonZero"

RULES: Mapping[str, Rule] = {
    "Identity": lambda place: place[0],
    **dict.fromkeys(TRUTHS.split(), partial(_constantly, TRUTH)),
    **dict.fromkeys(MOVES.split(), lambda place: place.hull(0)),
    **dict.fromkeys(PLACES.split(), partial(_constantly, (0, LARGEST_SIZE))),
    **{op: partial(_compared, rule) for op, rule in COMPARED.items()},
    **dict.fromkeys(("Cast", "CastLike"), _cast),
    "Abs": lambda place: absolute(place[0]),
    "Add": lambda place: growing(np.add, *place.all()),
    "BitShift": _shift,
    "Concat": lambda place: union(*(each.hull() for each in place.all())),
    "ConstantOfShape": _filled,
    "ConvInteger": _conv,
    "CumSum": _running_sum,
    "Div": _quotient,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Mod": _remainder,
    "Mul": _product,
    "Neg": lambda place: negative(place[0]),
    "Pad": _padded,
    "QuantizeLinear": lambda place: box(*place.limits),
    "Range": lambda place: union(place.hull(0), place.hull(1)),
    "ReduceSum": _reduce_sum,
    "Sub": lambda place: growing(np.add, place[0], negative(place[1])),
    "Trilu": lambda place: union(place.hull(0), box(0, 0)),
    "Where": lambda place: union(place[1], place[2]),
}
"""Operator -> its rule. Outputs but the first hold all of their type, except those of Split."""
