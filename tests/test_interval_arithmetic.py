"""Results lie in the boxes that are calculated for them, and reach their ends."""

from collections.abc import Callable
from operator import add, mul
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq import interval_arithmetic
from onnx_intq.interval_arithmetic import (
    LARGEST_BOX,
    Box,
    absolute,
    aligned,
    box,
    clipped,
    common,
    corners,
    growing,
    negative,
    of_constant,
    truncated,
    union,
    weighted,
    wrapped,
)

Array = npt.NDArray[Any]
SHAPES = ((1,), (4,), (3, 1), (3, 4), (2, 1, 1))
FAR = 1 << 70
"""Beyond int64."""


@st.composite
def boxes(draw: st.DrawFn, reach: int = FAR) -> tuple[Box, Array]:
    """A box, and a tensor of shape [2, 3, 4] within it that is often at the ends."""
    shape = draw(st.sampled_from(SHAPES))
    size = int(np.prod(shape))
    ends = st.tuples(*[st.integers(-reach, reach)] * 2).map(sorted)
    pairs = np.array(draw(st.lists(ends, min_size=size, max_size=size)), object)
    found = Box(pairs[:, 0].reshape(shape), pairs[:, 1].reshape(shape))
    random = draw(st.randoms(use_true_random=False))
    low, high = (np.broadcast_to(end, (2, 3, 4)) for end in (found.low, found.high))
    values = [
        random.choice((a, b, random.randint(a, b)))
        for a, b in zip(low.flat, high.flat, strict=True)
    ]
    return found, np.array(values, object).reshape(2, 3, 4)


def holds(found: Box, values: Array) -> bool:
    return bool(((found.low <= values) & (values <= found.high)).all())


OPERATIONS: dict[str, tuple[Callable[[Box, Box], Box], Callable[[Array, Array], Array]]] = {
    "add": (lambda a, b: growing(np.add, a, b), add),
    "subtract": (lambda a, b: growing(np.add, a, negative(b)), lambda x, y: x - y),
    "maximum": (lambda a, b: growing(np.maximum, a, b), np.maximum),
    "minimum": (lambda a, b: growing(np.minimum, a, b), np.minimum),
    "multiply": (lambda a, b: corners(mul, a, b), mul),
    "absolute": (lambda a, _: absolute(a), lambda x, _: abs(x)),
    "clip": (lambda a, _: clipped(a, -5, 9), lambda x, _: np.minimum(np.maximum(x, -5), 9)),
    "first": (union, lambda x, _: x),
    "second": (union, lambda _, y: y),
}


@given(a=boxes(), b=boxes(), name=st.sampled_from(sorted(OPERATIONS)))
def test_results_lie_in_their_box(a: tuple[Box, Array], b: tuple[Box, Array], name: str) -> None:
    of_boxes, of_values = OPERATIONS[name]
    assert holds(a[0], a[1])
    found = of_boxes(a[0], b[0])
    assert found.low.dtype == found.high.dtype == object
    assert found.low.shape == found.high.shape
    assert holds(found, of_values(a[1], b[1]))


@given(a=boxes(), b=boxes(1000), sign=st.sampled_from([1, -1]))
def test_quotients_lie_in_their_box(a: tuple[Box, Array], b: tuple[Box, Array], sign: int) -> None:
    shift = 1001 * sign
    divisor = growing(np.add, b[0], box(shift, shift))
    found = corners(truncated, a[0], divisor)
    quotients = [
        abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        for x, y in zip(a[1].flat, (b[1] + shift).flat, strict=True)
    ]
    assert holds(found, np.array(quotients, object).reshape(2, 3, 4))


@given(a=boxes(), width=st.integers(0, 9), low=st.integers(-FAR, FAR))
def test_what_lies_in_two_boxes_lies_in_their_common_one(
    a: tuple[Box, Array], width: int, low: int
) -> None:
    around = Box(a[1] - width, a[1] + width)
    found = common(a[0], around, box(-FAR, FAR))
    assert holds(found, a[1])
    assert (found.high - found.low <= 2 * width).all()
    assert holds(a[0], found.low)
    assert common(a[0]).ends == a[0].ends


@pytest.mark.parametrize(
    ("ends", "limits", "expected"),
    [
        ((128, 383), (-128, 127), (-128, 127)),
        ((-384, -129), (-128, 127), (-128, 127)),
        ((200, 210), (-128, 127), (-56, -46)),
        ((0, 255), (-128, 127), (0, 255)),
        ((127, 128), (-128, 127), (127, 128)),
        ((0, 256), (0, 255), (0, 256)),
        ((256, 300), (0, 255), (0, 44)),
        ((-128, 127), (-128, 127), (-128, 127)),
        ((1 << 32, (1 << 32) + 5), (-(1 << 31), (1 << 31) - 1), (0, 5)),
    ],
)
def test_a_wrap_that_keeps_the_order_is_followed(
    ends: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert wrapped(box(*ends), limits).ends == expected


@given(low=st.integers(-2000, 2000), width=st.integers(0, 300))
def test_a_wrap_is_followed_exactly_where_order_is_kept(low: int, width: int) -> None:
    values = np.arange(low, low + width + 1)
    stored = values.astype(np.int8)
    in_order = bool((np.diff(stored.astype(np.int64)) == 1).all())
    found = wrapped(box(low, low + width), (-128, 127)).ends
    assert found == ((stored[0], stored[-1]) if in_order else (low, low + width))


def test_all_channels_wrap_by_the_same_number_or_none_does() -> None:
    near = wrapped(Box(np.array([130, 300]), np.array([140, 383])), (-128, 127))
    assert near.low.tolist() == [-126, 44]
    assert near.high.tolist() == [-116, 127]
    far = wrapped(Box(np.array([0, 300]), np.array([100, 383])), (-128, 127))
    assert far.ends == (0, 383)


@pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.bool_, ml_dtypes.int4, object])
def test_exact_boxes_hold_pythons_integers(dtype: npt.DTypeLike) -> None:
    found = of_constant(np.array([[0], [1]]).astype(dtype)).exact()
    assert found.high is found.low
    assert found.low.shape == (2, 1)
    assert [int(value) for value in found.low.flat] == [0, 1]
    assert growing(np.add, *[corners(mul, found, box(FAR, FAR))] * 2).ends == (0, 2 * FAR)
    top = of_constant(np.array((1 << 64) - 1, np.uint64)).exact()
    assert growing(np.add, top, top).ends == ((1 << 65) - 2,) * 2


def test_boxes_that_would_be_too_large_are_hulls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_constant(np.arange(LARGEST_BOX)).exact().low.size == LARGEST_BOX
    many = of_constant(np.arange(LARGEST_BOX + 1))
    assert (many.exact().low.shape, many.exact().ends) == ((1,), (0, LARGEST_BOX))
    monkeypatch.setattr(interval_arithmetic, "LARGEST_BOX", 12)
    row, column = of_constant(np.arange(4)), of_constant(np.arange(4)[:, None])
    assert [each.low.shape for each in aligned(row, column)] == [(1,), (1,)]
    assert [each.low.shape for each in aligned(row, of_constant(column.low[:3]))] == [(4,), (3, 1)]
    assert growing(np.add, row.exact(), column.exact()).ends == (0, 6)


def test_boxes_that_do_not_broadcast_are_hulls() -> None:
    a, b = of_constant(np.arange(3)).exact(), of_constant(np.arange(4)).exact()
    assert [each.ends for each in aligned(a, b)] == [(0, 2), (0, 3)]
    assert corners(mul, a, b).ends == (0, 6)


@given(
    weights=st.lists(st.integers(-FAR, FAR), min_size=6, max_size=6),
    ends=st.tuples(*[st.integers(-FAR, FAR)] * 2).map(sorted),
    small=st.booleans(),
    axis=st.sampled_from([0, 1, -1]),
)
def test_weighted_sums_reach_their_ends(
    weights: list[int], ends: list[int], small: bool, axis: int
) -> None:
    if small:
        weights, ends = [w % 256 for w in weights], sorted(end % 256 for end in ends)
    matrix = np.array(weights, object).reshape(2, 3)
    low, high = ends
    found = weighted(matrix.astype(np.int64) if small else matrix, (low, high), axis)
    positive, rest = np.maximum(matrix, 0), np.minimum(matrix, 0)
    assert np.array_equal(found.low, (positive * low + rest * high).sum(axis, keepdims=True))
    assert np.array_equal(found.high, (positive * high + rest * low).sum(axis, keepdims=True))


def test_weights_of_int64_do_not_wrap() -> None:
    weights = np.array([[1 << 62, 1 << 62, 1 << 62]])
    assert weighted(weights, (-1, 2), -1).ends == (-3 << 62, 3 << 63)
    assert weighted(weights[:, :0], (-1, 2), -1).ends == (0, 0)
    assert weighted(0 * weights, (0, (1 << 64) - 1), -1).ends == (0, 0)
