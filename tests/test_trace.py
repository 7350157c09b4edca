from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnx_intq.graph import Names, model_from_graph
from onnx_intq.runtime import Session
from onnx_intq.trace import Builder, Value, take
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
    st.one_of(st.integers(0, 63), st.sampled_from([7, 15, 30, 31, 32, 62])),
    st.integers(-2, 2),
).filter(lambda edge: INT64.min <= edge <= INT64.max)
intervals = st.tuples(edges, edges).map(lambda ends: (min(ends), max(ends)))
positive = st.tuples(edges, edges).map(lambda e: (max(1, min(e)), max(1, *e)))


@st.composite
def arrays(draw: st.DrawFn, bounds: Bounds) -> np.ndarray:
    """Integers in `bounds`, both ends among them, shape [2, 3]."""
    middle = draw(st.lists(st.integers(*bounds), min_size=4, max_size=4))
    return np.array([bounds[0], *middle, bounds[1]], np.int64).reshape(2, 3)


@st.composite
def operands(draw: st.DrawFn, second: st.SearchStrategy[Bounds] = intervals) -> list[Any]:
    """Two arrays with their bounds."""
    drawn = [draw(intervals), draw(second)]
    return [(draw(arrays(bounds)), bounds) for bounds in drawn]


def fits(info: Any, *bounds: int) -> bool:
    return bool(info.min <= min(bounds) and max(bounds) <= info.max)


@law
@given(operands(), st.sampled_from(["+", "-", "*"]), st.booleans())
def test_sums_and_products_are_exact_or_refused(
    inputs: list[Any], sign: str, swapped: bool
) -> None:
    """Refused where the ends do not fit int64; int32 exactly where operands and result fit."""
    function: Function = eval(f"lambda a, b: a {sign} b")
    (a, a_bounds), (b, b_bounds) = reversed(inputs) if swapped else inputs
    corners = [function(x, y) for x in a_bounds for y in b_bounds]
    if not fits(INT64, *corners):
        with pytest.raises(IntqError, match="leave the integers' range"):
            function(*values(a_bounds, b_bounds))
        return
    traced = check(function, (a, a_bounds), (b, b_bounds))
    assert (traced.low, traced.high) == (min(corners), max(corners))
    assert (traced.dtype == np.int32) == fits(INT32, *corners, *a_bounds, *b_bounds)
    constant = check(lambda x: function(x, b), (a, a_bounds))  # b's ends are among its elements
    assert (constant.low, constant.high, constant.dtype) == (traced.low, traced.high, traced.dtype)
    check(lambda y: function(a, y), (b, b_bounds))


@law
@given(operands(positive))
def test_division_is_floor_for_values_and_constants(inputs: list[Any]) -> None:
    (a, a_bounds), (b, b_bounds) = inputs
    quotients = [x // y for x in a_bounds for y in b_bounds]
    for function, of in (
        (lambda x, y: x // y, inputs),
        (lambda x: x // b, inputs[:1]),
        (lambda x: x // b_bounds[1], inputs[:1]),
        (lambda y: a // y, inputs[1:]),
    ):
        try:
            traced = check(function, *of)
        except IntqError:  # a dividend raised by the divisor may not fit
            assert max(a_bounds[1], 0) - a_bounds[0] + b_bounds[1] > INT64.max
            continue
        assert min(quotients) <= traced.low
        assert traced.high <= max(quotients)


@law
@given(operands(), st.sampled_from([np.maximum, np.minimum]))
def test_extremes(inputs: list[Any], function: Any) -> None:
    (a, a_bounds), (b, b_bounds) = inputs
    traced = check(function, *inputs)
    assert (traced.low, traced.high) == tuple(map(function, a_bounds, b_bounds))
    check(lambda x: function(x, b), (a, a_bounds))
    check(lambda y: function(a_bounds[0], y), (b, b_bounds))


LONG: list[Function] = [
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: (a >> 11) * (b >> 11),
    lambda a, b: (a >> 3) // np.maximum(b, 1),
    lambda a, b: a // 12345,
    lambda a, b: a // np.arange(1, 1001),
    np.maximum,
    np.minimum,
    lambda a, b: np.where(a < b, a, b),
    lambda a, b: (a <= b) * a - (a == b),
    lambda a, b: np.clip(a, -70_000, (1 << 31) - 1),
    lambda a, b: np.abs(a) - np.sign(b),
    lambda a, b: np.sum(a >> 5, axis=1, keepdims=True) + np.sum(b >> 5, axis=0, keepdims=True),
    lambda a, b: np.max(a >> 12, axis=1, keepdims=True),
]


@pytest.mark.parametrize("function", LONG)
@pytest.mark.parametrize("bits", [15, 31, 40])
def test_long_arrays(function: Function, bits: int) -> None:
    """Long enough for vector instructions, with values of every size next to powers of two."""
    random, largest = np.random.default_rng(0), (1 << bits) - 1
    bounds = (-largest, largest)
    a, b = random.integers(-largest, largest + 1, (2, 20, 1000)) >> random.integers(0, bits)
    powers = np.array([s * ((1 << k) + d) for k in range(bits) for s in (-1, 1) for d in (-1, 0)])
    a[:10], b[5:15] = random.choice(powers, (10, 1000)), random.choice(powers, (10, 1000))
    check(function, (a, bounds), (b, bounds))


@law
@given(intervals.flatmap(lambda b: st.tuples(arrays(b), st.just(b))), edges, edges)
def test_functions_of_one_value(x: Any, one: int, other: int) -> None:
    bounds = x[1]
    low, high = min(one, other), max(one, other)
    traced = check(lambda a: np.clip(a, low, high), x)
    assert (traced.low, traced.high) == tuple(min(max(b, low), high) for b in bounds)
    traced = check(np.sign, x)
    assert (traced.low, traced.high) == (int(np.sign(bounds[0])), int(np.sign(bounds[1])))
    if bounds[0] == INT64.min:
        for function in (np.abs, np.negative):
            with pytest.raises(IntqError, match="leave the integers' range"):
                function(value(bounds))
        return
    check(np.abs, x)
    traced = check(lambda a: -a, x)
    assert (traced.low, traced.high) == (-bounds[1], -bounds[0])


COMPARISONS: list[Function] = [
    lambda a, b: a < b,
    lambda a, b: a <= b,
    lambda a, b: a > b,
    lambda a, b: a >= b,
    lambda a, b: a == b,
]


@law
@given(operands(), st.sampled_from(COMPARISONS), st.booleans())
def test_comparisons_and_choices(inputs: list[Any], function: Function, same: bool) -> None:
    if same:
        inputs[1] = inputs[0]
    (a, a_bounds), (b, b_bounds) = inputs
    traced = check(function, *inputs)
    assert traced.dtype == np.bool_
    assert (traced.low, traced.high) == (0, 1)
    check(lambda x: function(x, b), (a, a_bounds))
    check(lambda y: function(a, y), (b, b_bounds))
    traced = check(lambda x, y: np.where(function(x, y), x, y), *inputs)
    both = (*a_bounds, *b_bounds)
    assert (traced.low, traced.high) == (min(both), max(both))
    assert (traced.dtype == np.int32) == fits(INT32, *both)
    check(lambda x: np.where(function(x, b), 1, b), (a, a_bounds))
    check(lambda x: np.where(a < b, x, 3), (a, a_bounds))


@law
@given(intervals.flatmap(lambda b: st.tuples(arrays(b), st.just(b))), st.data())
def test_shifts(x: Any, data: st.DataObject) -> None:
    """By one constant, and by one per column; to the right always, to the left where it fits."""
    counts = st.integers(0, 62)
    for shift in (data.draw(counts), np.array(data.draw(st.lists(counts, min_size=3, max_size=3)))):
        least, most = int(np.min(shift)), int(np.max(shift))
        bounds = x[1]
        if bounds[0] >= 0 or max(bounds[1], 0) - bounds[0] + (1 << most) <= INT64.max:
            traced = check(lambda a, by=shift: a >> by, x)
            assert traced.low == bounds[0] >> (least if bounds[0] < 0 else most)
            assert traced.high == bounds[1] >> (most if bounds[1] < 0 else least)
        if fits(INT64, *(end << most for end in bounds)):
            check(lambda a, by=shift: a << by, x)
        else:
            with pytest.raises(IntqError, match="Mul"):
                value(bounds) << shift


def test_a_square_is_not_negative() -> None:
    for bounds, expected in (
        ((-5, 3), (0, 25)),
        ((2, 3), (4, 9)),
        ((-5, -2), (4, 25)),
        ((-5, 0), (0, 25)),
    ):
        traced = check(lambda x: x * x, ([*bounds, bounds[0]], bounds))
        assert (traced.low, traced.high) == expected


def test_nothing_is_emitted_for_nothing() -> None:
    x = value((0, 10), dtype=np.int32)
    assert np.clip(x, 0, 10) is x
    assert np.clip(x, -5, 99) is x
    assert np.abs(x) is x
    assert x + 0 is x
    assert 0 + x is x
    assert x - 0 is x
    assert sum([x]) is x
    assert not ops(x)
    assert (np.array([0]) + x).tensor is not x.tensor  # it may broadcast


def test_operands_are_cast_once_and_constants_are_shared() -> None:
    x = value((0, 255), dtype=np.uint8)
    y = (x + 7) * (x - 7) + np.where(x < 7, x, 7)
    assert ops(y).count("Cast") == 1
    assert len(y.builder.constants) == 1
    square = value((0, 255), dtype=np.uint8)
    assert ops(square * square) == ["Cast", "Mul"]


def test_int64_is_left_as_soon_as_the_operands_fit_int32() -> None:
    x = value((0, 1 << 30), dtype=np.int32)
    y = (x * 4) // 8 - 1
    assert y.dtype == np.int32
    assert ops(y) == ["Cast", "Mul", "Div", "Cast", "Sub"]


UNARY: dict[str, Function] = {
    "abs": np.abs,
    "neg": lambda a: -a,
    "sign": np.sign,
    "square": lambda a: a * a,
    "halve": lambda a: a >> 1,
    "shift": lambda a: a >> np.array([0, 3, 17]),
    "double": lambda a: a << 2,
    "third": lambda a: a // 3,
    "divide": lambda a: a // np.array([[1], [1000]]),
    "clip": lambda a: np.clip(a, -100, 1000),
    "table": lambda a: take(np.arange(50) ** 2 - 600, np.clip(a, 0, 49)),
    "sum": lambda a: np.sum(a, axis=-1, keepdims=True),
    "greatest": lambda a: np.max(np.clip(a, -(1 << 31), (1 << 31) - 1), axis=0, keepdims=True),
    "scale": lambda a: a * np.array([3, -5, 70000]),
    "offset": lambda a: 1000 - a,
}
BINARY: dict[str, Function] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a // np.maximum(np.abs(b), 1),
    "maximum": np.maximum,
    "minimum": np.minimum,
    "choose": lambda a, b: np.where(a < b, a, b - 1),
    "mask": lambda a, b: (a >= b) * b,
}
leaves = st.sampled_from(["x", "y"])
Tree = Any
trees: st.SearchStrategy[Tree] = st.recursive(
    leaves,
    lambda deeper: st.one_of(
        st.tuples(st.sampled_from(sorted(UNARY)), deeper),
        st.tuples(st.sampled_from(sorted(BINARY)), deeper, deeper),
    ),
    max_leaves=8,
)


def evaluate(tree: Tree, x: Any, y: Any) -> Any:
    """What a tree of operations gives for arrays, or for values."""
    if isinstance(tree, str):
        return {"x": x, "y": y}[tree]
    name, *operands = tree
    table = UNARY if len(operands) == 1 else BINARY
    return table[name](*(evaluate(operand, x, y) for operand in operands))


@settings(law, max_examples=400)
@given(trees, intervals, intervals, st.data())
def test_compositions_equal_numpy(tree: Tree, x: Bounds, y: Bounds, data: st.DataObject) -> None:
    """Any expression is either refused or bit for bit that of int64 arrays."""
    x, y = ((b[0] >> 34, b[1] >> 34) for b in (x, y))
    try:
        traced = evaluate(tree, *values(x, y, shape=(2, 3)))
    except IntqError:
        assume(False)
    inputs = [data.draw(arrays(bounds)) for bounds in (x, y)]
    equal_in_onnxruntime(traced, inputs, evaluate(tree, *inputs))
