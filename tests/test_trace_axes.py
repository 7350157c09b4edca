from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import Names, model_from_graph
from onnx_intq.runtime import Session
from onnx_intq.trace import LONGEST, Builder, Value, take
from onnx_intq.transform import IntqError

law = settings(derandomize=True, deadline=None, max_examples=150)
INT32, INT64 = np.iinfo(np.int32), np.iinfo(np.int64)
Bounds = tuple[int, int]
Function = Callable[..., Any]
Shape = Sequence[int | str | None] | None


def value(
    bounds: Bounds,
    shape: Shape = (4,),
    dtype: Any = np.int64,
    to: Builder | None = None,
) -> Any:
    """A new input, in a graph of its own unless `to` builds one."""
    if to is None:
        graph = gs.Graph(opset=21)
        to = Builder(graph, Names(graph), {})
    name = f"x{len(to.graph.inputs)}"
    to.graph.inputs.append(gs.Variable(name, dtype, None if shape is None else list(shape)))
    return to.value(to.graph.inputs[-1], *bounds)


def values(*bounds: Bounds, **kwargs: Any) -> list[Any]:
    first = value(bounds[0], **kwargs)
    return [first, *(value(b, to=first.builder, **kwargs) for b in bounds[1:])]


def ops(of: Value) -> list[str]:
    return [node.op for node in of.builder.graph.nodes]


def equal_in_onnxruntime(traced: Any, arrays: Sequence[np.ndarray], expected: Any) -> None:
    """The graph's integers are those of NumPy, inside the interval, of the narrowest type."""
    graph = traced.builder.graph
    graph.outputs = [traced.tensor]
    feeds = {t.name: a.astype(t.dtype) for t, a in zip(graph.inputs, arrays, strict=True)}
    (found,) = Session(model_from_graph(graph), threads=1).run(feeds).values()
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == traced.dtype
    if expected.size:
        assert traced.low <= expected.min()
        assert expected.max() <= traced.high
    if traced.tensor.shape is not None:
        sizes = zip(traced.tensor.shape, found.shape, strict=True)
        assert all(s == n for s, n in sizes if isinstance(s, int))


def check(function: Function, *inputs: tuple[Any, Bounds], **kwargs: Any) -> Any:
    """Trace `function` and compare."""
    arrays = [np.asarray(elements, np.int64) for elements, _ in inputs]
    first = value(inputs[0][1], arrays[0].shape, **kwargs)
    rest = (
        value(b, a.shape, to=first.builder, **kwargs)
        for (_, b), a in zip(inputs[1:], arrays[1:], strict=True)
    )
    traced = function(first, *rest)
    equal_in_onnxruntime(traced, arrays, function(*arrays))
    return traced


edges = st.builds(
    lambda sign, bit, beside: sign * (1 << bit) + beside,
    st.sampled_from([-1, 1]),
    st.one_of(st.integers(0, 62), st.sampled_from([7, 15, 30, 31, 32, 51, 53])),
    st.integers(-2, 2),
)
intervals = st.tuples(edges, edges).map(lambda ends: (min(ends), max(ends)))


def fits(info: Any, *bounds: int) -> bool:
    return bool(info.min <= min(bounds) and max(bounds) <= info.max)


@law
@given(
    intervals,
    st.sampled_from([0, 1, 2, -1, -3]),
    st.data(),
)
def test_sums_and_maxima_along_an_axis(bounds: Bounds, axis: int, data: st.DataObject) -> None:
    elements = data.draw(st.lists(st.integers(*bounds), min_size=22, max_size=22))
    x = np.array([bounds[0], *elements, bounds[1]]).reshape(2, 3, 4)
    count = x.shape[axis]
    ends = count * bounds[0], count * bounds[1]
    if max(map(abs, ends)) <= 1 << 53:
        traced = check(lambda a: np.sum(a, axis=axis, keepdims=True), (x, bounds))
        assert (traced.low, traced.high) == ends
        assert (traced.dtype == np.int32) == fits(INT32, *ends, *bounds)
    else:
        with pytest.raises(IntqError, match="ReduceSum"):
            np.sum(value(bounds, x.shape), axis=axis, keepdims=True)
    if fits(INT32, *bounds):
        traced = check(lambda a: np.max(a, axis=axis, keepdims=True), (x, bounds))
        assert (traced.low, traced.high) == bounds
    else:
        with pytest.raises(IntqError, match="ReduceMax"):
            np.max(value(bounds, x.shape), axis=axis, keepdims=True)


def test_sums_at_the_end_of_what_onnxruntime_adds_exactly() -> None:
    x = np.array([[(1 << 52) - 1, 1, 1 << 52], [0, 0, 1]])
    traced = check(lambda a: np.sum(a, axis=0, keepdims=True), (x, (0, 1 << 52)))
    assert traced.high == 1 << 53
    with pytest.raises(IntqError, match="ReduceSum"):
        np.sum(value((0, 1 << 52), (2, 3)), axis=1, keepdims=True)


def test_comparisons_are_counted() -> None:
    x = np.arange(-4, 4).reshape(2, 4)
    traced = check(lambda a: np.sum(a >= -3, axis=1, keepdims=True), (x, (-4, 3)))
    assert traced.dtype == np.int32
    assert (traced.low, traced.high) == (0, 4)


@pytest.mark.parametrize("shape", [(2, "n"), (2, None), None])
def test_dynamic_axes_have_at_most_the_longest_length(shape: Shape) -> None:
    traced = np.sum(value((-3, 5), shape, np.int8), axis=1, keepdims=True)
    assert (traced.low, traced.high) == (-3 * LONGEST, 5 * LONGEST)
    positive = np.sum(value((3, 5), shape, np.int8), axis=-1, keepdims=True)
    assert (positive.low, positive.high) == (0, 5 * LONGEST)  # there may be nothing to add
    with pytest.raises(IntqError, match="division by a value that may be below 1"):
        1 // positive
    with pytest.raises(IntqError, match="ReduceSum"):
        np.sum(value((0, 1 << 38), shape), axis=1, keepdims=True)
    known = np.sum(value((3, 5), shape, np.int8), axis=0, keepdims=True)
    if shape is not None:
        assert (known.low, known.high) == (6, 10)
        assert known.tensor.shape == [1, shape[1]]
        assert traced.tensor.shape == [2, 1]
    for length in (0, 1, 7):
        x = value((-3, 5), shape, np.int8)
        y = np.sum(x, axis=1, keepdims=True)
        q = np.random.default_rng(length).integers(-3, 6, (2, length))
        equal_in_onnxruntime(y, [q], q.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((2, 3), (3,), [2, 3]),
        ((2, 1), (1, 3), [2, 3]),
        ((), (2,), [2]),
        (("n", 3), (4, 1, 3), [4, "n", 3]),
        (("n", 1), (1, "t"), ["n", "t"]),
        (("n",), (5,), [5]),
        ((None,), (1,), [None]),
        ((None, 3), (5, 1), [5, 3]),
        ((0,), (1,), [0]),
        (None, (2,), None),
    ],
)
def test_shapes_broadcast(a: Shape, b: Shape, expected: Shape) -> None:
    x = value((0, 9), a, np.int32)
    y = value((0, 9), b, np.int32, to=x.builder)
    results: list[Any] = [x + y, y * x, x < y, np.maximum(x, y)]
    results += [np.where(x < y, 1, 2), np.where(x < 5, y, 2)]
    assert [z.tensor.shape for z in results] == [expected] * len(results)
    if b is not None and a is not None and all(isinstance(s, int) for s in b):
        assert (x + np.zeros([int(s or 0) for s in b], int)).tensor.shape == expected


def test_an_unknown_size_is_not_taken_for_1() -> None:
    """A sum over a broadcast axis of unknown size is proven for the longest."""
    x = value((0, 9), (2, None), np.int32)
    total = np.sum(x * np.array([[3]]), axis=1, keepdims=True)
    assert total.high == 27 * LONGEST


@law
@given(st.data())
def test_tables(data: st.DataObject) -> None:
    low, high = data.draw(intervals)
    size = data.draw(st.integers(1, 300))
    table = np.array(data.draw(st.lists(st.integers(low, high), min_size=size, max_size=size)))
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=9)))
    traced = check(lambda i: take(table, i), (index, (0, size - 1)))
    assert (traced.low, traced.high) == (table.min(), table.max())
    candidates = (np.int8, np.uint8, np.int32, np.int64)
    expected = next(t for t in candidates if fits(np.iinfo(t), *table))
    assert traced.dtype == expected
    check(lambda i: take(table, i) - 1 if table.min() > INT64.min else i, (index, (0, size - 1)))
    wide = value((0, size - 1))
    wide.builder.target = "tensorrt"  # which has no tables of 8 bits
    assert take(table, wide).dtype == (np.int32 if fits(INT32, *table) else np.int64)
    for outside in ((-1, 0), (0, size)):
        with pytest.raises(IntqError, match=f"a table of {size} entries: operands in"):
            take(table, value(outside))
    with pytest.raises(IntqError, match="a table"):
        take(table[None], value((0, 0)))


SMALL = [(0, 255), (-128, 127), (0, 127), (-1, 0), (0, 1), (-129, 3), (0, 256), (-70000, 70000)]
SMALL += [(-32896, 32639), (-32897, 0), (0, 32640)]
TWO_BYTES = -128 * 256 - 128, 127 * 256 + 127


@pytest.mark.parametrize("b_bounds", SMALL)
@pytest.mark.parametrize("a_bounds", SMALL)
@pytest.mark.parametrize("length", [1, 33, 600])
@pytest.mark.parametrize("portable", [True, False])
def test_products_of_matrices(
    a_bounds: Bounds, b_bounds: Bounds, length: int, portable: bool
) -> None:
    """Also where all elements are the ends: u8 x s8 pairs must not saturate.

    16 bits on the right are two products of 8.
    """
    random = np.random.default_rng(0)
    a = random.choice(np.array(a_bounds), (2, 5, length))
    b = random.choice(np.array(b_bounds), (2, length, 4))
    a[0, 0], b[0, :, 0] = a_bounds[1], b_bounds[1]
    a[0, 1], b[0, :, 1] = a_bounds[0], b_bounds[0]

    def product(a: Any, b: Any) -> Any:
        if isinstance(a, Value):
            a.builder.portable = portable
        return np.matmul(a, b)

    traced = check(product, (a, a_bounds), (b, b_bounds))
    left = fits(np.iinfo(np.uint8), *a_bounds) or fits(np.iinfo(np.int8), *a_bounds)
    eight = fits(np.iinfo(np.int8), *b_bounds) and left
    sixteen = TWO_BYTES[0] <= b_bounds[0] and b_bounds[1] <= TWO_BYTES[1] and left
    assert ops(traced).count("MatMulInteger") == (1 if eight else 2 * sixteen)
    if eight:
        node = traced.builder.graph.nodes[-1]
        unsigned = [a_bounds[0] >= 0, a_bounds[0] >= 0 and portable]
        assert [t.dtype == np.uint8 for t in node.inputs[:2]] == unsigned
        zeros = [int(t.values) for t in node.inputs[2:]]
        assert zeros == ([0, 128] if unsigned[1] else [])
        read = {id(t) for n in traced.builder.graph.nodes for t in n.inputs}
        assert all(id(n.outputs[0]) in read for n in traced.builder.graph.nodes[:-1])


def test_long_products_of_matrices_are_refused_or_wide() -> None:
    shape = (2, "n")
    assert np.matmul(value((0, 255), shape), value((-1, 0), (None, 3))).dtype == np.int32
    assert np.matmul(value((0, 255), shape), value((-32896, 0), (None, 3))).dtype == np.int64
    assert np.matmul(value((-70000, 255), shape), value((-1, 0), (None, 3))).dtype == np.int64
    a = value((0, 255), (2, 1 << 17))
    assert np.matmul(a, value((-128, 127), (1 << 17, 3))).dtype == np.int64
    with pytest.raises(IntqError, match="MatMul"):
        np.matmul(value((0, 1 << 24), shape), value((0, 1 << 24), (None, 3)))
