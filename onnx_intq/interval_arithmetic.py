"""Arithmetic with boxes: an interval for each channel of a tensor, in exact integers.

Law: if every element of each operand lies in its interval, so does every element of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

Interval = tuple[int, int]
"""The lowest and the highest value, both included."""
Array = npt.NDArray[Any]

LARGEST_BOX = 1 << 16
"""Intervals in a box that is calculated with; where there would be more, their hull is used."""


@dataclass(frozen=True, eq=False)
class Box:
    """The intervals of a tensor's elements.

    Attributes:
        low: The lowest values; integers of any dtype, at least one axis. The shape broadcasts to
            the tensor's, such as [channels, 1] to [batch, channels, time], once leading axes of
            length 1 are dropped.
        high: The highest, of the same shape.
    """

    low: Array
    high: Array

    @property
    def ends(self) -> Interval:
        """The lowest and the highest value of all."""
        return int(self.low.min()), int(self.high.max())

    def hull(self) -> Box:
        """The smallest interval that holds all, for every element."""
        return box(*self.ends)

    def exact(self) -> Box:
        """As Python's integers, which cannot overflow; the hull of a box that is too large."""
        if self.low.size > LARGEST_BOX:
            return self.hull()
        low = signed(self.low).astype(object)
        return Box(low, low if self.high is self.low else signed(self.high).astype(object))


def signed(values: Array) -> Array:
    """Integers or booleans as int64; as Python's integers where these do not fit it."""
    return values.astype(object if values.dtype in (object, np.uint64) else np.int64)


def box(low: int, high: int) -> Box:
    """One interval for every element."""
    return Box(np.array([low], object), np.array([high], object))


def of_constant(values: Array) -> Box:
    """The box of known values, at least one."""
    values = np.atleast_1d(values)
    return Box(values, values)


def aligned(*boxes: Box) -> list[Box]:
    """Boxes that broadcast to `LARGEST_BOX` intervals at most: themselves, or their hulls."""
    try:
        shape = np.broadcast_shapes(*(each.low.shape for each in boxes))
    except ValueError:  # nor do the tensors broadcast: the node cannot run
        return [each.hull() for each in boxes]
    return [each.hull() for each in boxes] if math.prod(shape) > LARGEST_BOX else list(boxes)


def union(*boxes: Box) -> Box:
    """For each element, the smallest interval that holds those of all boxes."""
    boxes_ = aligned(*boxes)
    lows, highs = [each.low for each in boxes_], [each.high for each in boxes_]
    return Box(reduce(np.minimum, lows), reduce(np.maximum, highs))


def common(*boxes: Box) -> Box:
    """For each element, what the intervals of all boxes share; for elements that lie in all."""
    boxes_ = aligned(*boxes)
    lows, highs = [each.low for each in boxes_], [each.high for each in boxes_]
    return Box(reduce(np.maximum, lows), reduce(np.minimum, highs))


def growing(function: Callable[[Array, Array], Array], *boxes: Box) -> Box:
    """The results of a function of two arguments, applied in turn, that grows with both."""
    boxes_ = aligned(*boxes)
    lows, highs = [each.low for each in boxes_], [each.high for each in boxes_]
    return Box(reduce(function, lows), reduce(function, highs))


def corners(function: Callable[[Array, Array], Array], a: Box, b: Box) -> Box:
    """The results of a function that is monotone in each argument, whichever way."""
    a, b = aligned(a, b)
    found = [function(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return Box(reduce(np.minimum, found), reduce(np.maximum, found))


def negative(a: Box) -> Box:
    """Of -x."""
    return Box(-a.high, -a.low)


def absolute(a: Box) -> Box:
    """Of the distance from 0."""
    return Box(np.maximum(np.maximum(a.low, -a.high), 0), np.maximum(-a.low, a.high))


def clipped(a: Box, low: int, high: int) -> Box:
    """Of min(max(x, low), high), where low <= high."""
    return growing(np.minimum, growing(np.maximum, a, box(low, low)), box(high, high))


def truncated(a: Array, b: Array) -> Array:
    """The quotient rounded towards 0, as ONNX's Div of integers has it."""
    quotient = abs(a) // abs(b)
    return np.where((a < 0) == (b < 0), quotient, -quotient)


def wrapped(a: Box, limits: Interval) -> Box:
    """Stored in a type of fewer bits, which drops the others, if that keeps all values in order.

    It does where the same multiple of 2^bits takes all values into the type: 128..383 becomes
    -128..127 in int8. Else the box itself.
    """
    size = limits[1] - limits[0] + 1
    low, high = ((end - limits[0]) // size for end in a.ends)
    return Box(a.low - low * size, a.high - low * size) if low == high else a


def weighted(weights: Array, values: Interval, axis: int) -> Box:
    """The sums of integer weights times values along an axis, which stays, of length 1.

    Args:
        weights: At least one axis.
        values: Of what the weights are multiplied with; any of it at any place.
        axis: To add up along.
    """
    if not weights.size:
        return box(0, 0)
    largest = max(1, abs(int(weights.min())), abs(int(weights.max())))
    if largest * max(map(abs, values)) * weights.shape[axis] >= 1 << 62:
        weights = weights.astype(object)
    low, high = (weights * value for value in values)
    return Box(
        np.minimum(low, high).sum(axis=axis, keepdims=True),
        np.maximum(low, high).sum(axis=axis, keepdims=True),
    )
