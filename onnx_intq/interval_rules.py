"""The interval of an operator's exact result, from the intervals of what it reads.

Exact means before it is stored in its type. A rule answers with an interval, or in words why it
has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant

Interval = tuple[int, int]
"""The lowest and the highest value, both included."""
Array = npt.NDArray[Any]

LARGEST_SIZE = (1 << 31) - 1
"""No tensor has more elements, so sizes and places within tensors are no larger."""
TRUTH = (0, 1)


@dataclass(frozen=True)
class Place:
    """A node and the intervals of what it reads; a `KeyError` tells that one has none.

    Attributes:
        node: The node.
        known: `id` of a tensor -> its interval.
        limits: Of the type of its first integer output.
    """

    node: gs.Node
    known: Mapping[int, Interval]
    limits: Interval

    def __getitem__(self, index: int) -> Interval:
        """The interval of input `index`."""
        return self.known[id(self.node.inputs[index])]

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        return index < len(self.node.inputs) and not self.node.inputs[index].is_empty()

    def all(self) -> list[Interval]:
        """The intervals of all inputs."""
        return [self[index] for index in range(len(self.node.inputs))]

    def size(self, index: int, axis: int) -> int | None:
        """The length of an axis of an input, None if it is unknown before run time."""
        shape = self.node.inputs[index].shape
        size = shape[axis] if shape is not None else None
        return size if isinstance(size, int) else None


Rule = Callable[[Place], Interval | str]
EXACT_IN_FLOAT64 = 1 << 53
"""onnxruntime 1.31 computes ReduceSum and Mod with `fmod` of integers in float64."""
ROUNDED = "may pass 2^53, above which onnxruntime rounds"
UNKNOWN_SIZE = "adds up along an axis of unknown length"


def hull(*intervals: Interval) -> Interval:
    """The smallest interval that holds all."""
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def corners(function: Callable[[int, int], int], a: Interval, b: Interval) -> Interval:
    """The range of a function that is monotone in each argument."""
    found = [function(x, y) for x in a for y in b]
    return min(found), max(found)


def _product(place: Place) -> Interval:
    low, high = corners(lambda x, y: x * y, place[0], place[1])
    if place.node.inputs[0] is place.node.inputs[1]:  # a square
        low = 0 if place[0][0] <= 0 <= place[0][1] else min(x * x for x in place[0])
    return low, high


def _quotient(place: Place) -> Interval | str:
    """ONNX's Div of integers truncates."""
    if place[1][0] <= 0 <= place[1][1]:
        return "may divide by 0"
    return corners(_truncated, place[0], place[1])


def _truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def _remainder(place: Place) -> Interval | str:
    """Its sign is the divisor's, with `fmod` the dividend's."""
    if place[1][0] <= 0:
        return "may have a divisor below 1"
    most = place[1][1] - 1
    if place.node.attrs.get("fmod") and max(most, *map(abs, place[0])) > EXACT_IN_FLOAT64:
        return ROUNDED
    return (-most if place.node.attrs.get("fmod") and place[0][0] < 0 else 0), most


def _negative(place: Place) -> Interval:
    low, high = place[0]
    return -high, -low


def _absolute(place: Place) -> Interval:
    low, high = place[0]
    return max(low, -high, 0), max(-low, high)


def _sign(place: Place) -> Interval:
    low, high = place[0]
    return max(min(low, 1), -1), max(min(high, 1), -1)


def _clip(place: Place) -> Interval:
    low, high = place[0]
    if place.has(1):
        low, high = max(low, place[1][0]), max(high, place[1][1])
    if place.has(2):
        low, high = min(low, place[2][0]), min(high, place[2][1])
    return low, high


def _shift(place: Place) -> Interval | str:
    if place[1][1] >= place.limits[1].bit_length():
        return "may shift by all bits of its type"
    left = place.node.attrs["direction"] == "LEFT"
    return corners(lambda x, by: x << by if left else x >> by, place[0], place[1])


def _reduce_sum(place: Place) -> Interval | str:
    axes = constant(place.node, 1)
    if place.has(1) and axes is None:
        return UNKNOWN_SIZE
    shape = place.node.inputs[0].shape
    if axes is None or not axes.size:
        if place.node.attrs.get("noop_with_empty_axes"):
            return place[0]
        axes = np.arange(len(shape or ()))
    sizes = [place.size(0, int(axis)) for axis in axes]
    if shape is None or None in sizes:
        return UNKNOWN_SIZE
    count = math.prod(filter(None, sizes))
    found = place[0][0] * count, place[0][1] * count
    return found if max(map(abs, found)) <= EXACT_IN_FLOAT64 else ROUNDED


def _conv(place: Place) -> Interval | str:
    """Padding is the zero point, which adds 0."""
    weights = constant(place.node, 1)
    zero = constant(place.node, 3) if place.has(3) else np.zeros((), np.int64)
    if weights is None or zero is None:
        return "has weights that are not constant"
    centred = weights.astype(np.int64)
    centred -= zero.astype(np.int64).reshape(-1, *[1] * (weights.ndim - 1))
    return _weighted(centred.reshape(len(centred), -1), hull(_centred(place, 0, 2), (0, 0)), -1)


def _matmul(place: Place) -> Interval | str:
    """The constant operand, if any, counts with its own values."""
    for index, axis in ((1, -2), (0, -1)):
        values = constant(place.node, index)
        zero = constant(place.node, index + 2) if place.has(index + 2) else np.zeros(1, np.int64)
        if values is None or zero is None:
            continue
        zero = zero.astype(np.int64)
        if index == 0 and zero.ndim == 1 and zero.size > 1:
            zero = zero[:, None]
        centred = values.astype(np.int64) - zero
        other = _centred(place, 1 - index, 3 - index)
        return _weighted(centred, other, axis if centred.ndim > 1 else -1)
    sizes = (
        place.size(0, -1),
        place.size(1, -2 if len(place.node.inputs[1].shape or ()) > 1 else -1),
    )
    count = next(filter(None, sizes), None)
    if count is None:
        return UNKNOWN_SIZE
    low, high = corners(lambda x, y: x * y, _centred(place, 0, 2), _centred(place, 1, 3))
    return count * low, count * high


def _centred(place: Place, index: int, zero: int) -> Interval:
    """An input less its zero point."""
    zeros = place[zero] if place.has(zero) else (0, 0)
    return corners(lambda x, z: x - z, place[index], zeros)


def _weighted(weights: Array, values: Interval, axis: int) -> Interval:
    """The range of sums of weights times values along an axis: exact, channel by channel."""
    if not weights.size:
        return 0, 0
    largest = max(abs(int(weights.min())), abs(int(weights.max()))) * max(map(abs, values))
    if largest * weights.shape[axis] >= 1 << 62:
        weights = weights.astype(object)
    low, high = (weights * value for value in values)
    return (
        int(np.minimum(low, high).sum(axis=axis).min()),
        int(np.maximum(low, high).sum(axis=axis).max()),
    )


def _running_sum(place: Place) -> Interval | str:
    axis = constant(place.node, 1)
    size = None if axis is None else place.size(0, int(axis.item()))
    if size is None:
        return UNKNOWN_SIZE
    low, high = place[0]
    return min(0, low * size), max(0, high * size)


def _filled(place: Place) -> Interval:
    value = int(place.node.attrs["value"].values.item())
    return value, value


def _padded(place: Place) -> Interval:
    if place.node.attrs.get("mode", "constant") != "constant":
        return place[0]
    return hull(place[0], place[2] if place.has(2) else (0, 0))


def _cast(place: Place) -> Interval:
    return TRUTH if place.limits == TRUTH else place[0]


def _inputs(place: Place, *indices: int) -> Interval:
    return hull(*(place[index] for index in indices))


def _pairwise(function: Callable[[int, int], int], place: Place) -> Interval:
    """Of two or more operands, for a function that grows with both."""
    (low, high), *others = place.all()
    for each in others:
        low, high = function(low, each[0]), function(high, each[1])
    return low, high


def _constantly(interval: Interval, _: Place) -> Interval:
    return interval


TRUTHS = "Equal Greater GreaterOrEqual Less LessOrEqual Not And Or Xor EyeLike"
MOVES = """Identity Reshape Flatten Transpose Squeeze Unsqueeze Slice Gather GatherElements GatherND
    Split Expand Tile Compress DepthToSpace SpaceToDepth MaxPool GlobalMaxPool ReduceMax ReduceMin
    Unique TopK"""
PLACES = "Shape Size ArgMax ArgMin NonZero"

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(TRUTHS.split(), partial(_constantly, TRUTH)),
    **dict.fromkeys(MOVES.split(), lambda place: place[0]),
    **dict.fromkeys(PLACES.split(), partial(_constantly, (0, LARGEST_SIZE))),
    **dict.fromkeys(("Cast", "CastLike"), _cast),
    "Abs": _absolute,
    "Add": lambda place: corners(lambda x, y: x + y, place[0], place[1]),
    "BitShift": _shift,
    "Clip": _clip,
    "Concat": lambda place: hull(*place.all()),
    "ConstantOfShape": _filled,
    "ConvInteger": _conv,
    "CumSum": _running_sum,
    "Div": _quotient,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Max": partial(_pairwise, max),
    "Min": partial(_pairwise, min),
    "Mod": _remainder,
    "Mul": _product,
    "Neg": _negative,
    "Pad": _padded,
    "QuantizeLinear": lambda place: place.limits,
    "Range": lambda place: _inputs(place, 0, 1),
    "ReduceSum": _reduce_sum,
    "Relu": lambda place: (max(place[0][0], 0), max(place[0][1], 0)),
    "Sign": _sign,
    "Sub": lambda place: corners(lambda x, y: x - y, place[0], place[1]),
    "Trilu": lambda place: hull(place[0], (0, 0)),
    "Where": lambda place: _inputs(place, 1, 2),
}
"""Operator -> its rule. Outputs but the first hold all of their type, except those of Split."""
