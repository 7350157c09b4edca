from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq import combination
from onnx_intq.combination import Term, emit
from onnx_intq.graph import Names, model_from_graph
from onnx_intq.grid import Grid, common_exponent, weighted_sum
from onnx_intq.lowering import Operand, Site
from onnx_intq.runtime import Session
from onnx_intq.trace import Builder

law = settings(derandomize=True, deadline=None, max_examples=100)
INT8, UINT8, INT16 = Grid(8, signed=True), Grid(8, signed=False), Grid(16, signed=True)
FAST = ["Cast", "Mul", "Cast", "Mul", "Add", "Add", "Div", "Clip", "Cast"]


def site(grid: Grid, zero_point: int, first: int | None = None, last: int | None = None) -> Site:
    """The sum's result; nothing else of a site is looked at."""
    tensor = gs.Variable("y", grid.dtype)
    return Site(
        node=gs.Node("Add"),
        bias=None,
        chain=(),
        result=Operand(tensor=tensor, scale=1.0, zero_point=zero_point, grid=grid),
        first=grid.low if first is None else first,
        last=grid.high if last is None else last,
    )


def run(
    of: Site, terms: list[tuple[Grid, int, float]], arrays: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, list[gs.Node]]:
    """What onnxruntime gives, what the reference gives, and the nodes.

    Args:
        of: The result's grid and limits.
        terms: Grid, zero point and factor of each addend.
        arrays: Its integers.
    """
    graph = gs.Graph(opset=21)
    builder = Builder(graph, Names(graph), {})
    addends: list[Term] = []
    feeds: dict[str, np.ndarray] = {}
    for (grid, zero_point, factor), array in zip(terms, arrays, strict=True):
        x = gs.Variable(f"x{len(feeds)}", grid.dtype, list(array.shape))
        graph.inputs.append(x)
        feeds[x.name] = array.astype(grid.dtype)
        value = builder.value(x, grid.low, grid.high)
        addends.append(Term(value=value, zero_point=zero_point, factor=factor))
    result = emit(builder, addends, of)
    assert (result.low, result.high) == (of.first, of.last)
    graph.outputs = [result.tensor]
    (found,) = Session(model_from_graph(graph), threads=1).run(feeds).values()
    assert found.dtype == of.result.grid.dtype
    factors, c = common_exponent([f for _, _, f in terms], 62 - of.result.grid.bits)
    centred = [a.astype(np.int64) - zero for a, (_, zero, _) in zip(arrays, terms, strict=True)]
    limits: dict[str, int] = {"low": of.first, "high": of.last}
    zero_point = of.result.zero_point
    expected = weighted_sum(centred, factors, c, zero_point=zero_point, **limits)
    return found, expected, list(graph.nodes)


def pairs(*grids: Grid) -> list[np.ndarray]:
    """All pairs of integers: two arrays [256, 256]."""
    axes = [np.arange(grid.low, grid.high + 1) for grid in grids]
    return list(np.meshgrid(*axes, indexing="ij"))


factors = st.builds(
    lambda sign, e: sign * 2.0**e,
    st.sampled_from([1, 1, -1]),
    st.one_of(st.floats(-6, 2), st.integers(-4, 1), st.floats(-20, 6)),
)
aligned = st.integers(1, 3000).map(lambda k: k / 1023)


@st.composite
def addends(draw: st.DrawFn) -> tuple[Grid, int, float]:
    grid = draw(st.sampled_from([INT8, UINT8]))
    return grid, draw(st.integers(grid.low, grid.high)), draw(st.one_of(factors, aligned))


@st.composite
def sites(draw: st.DrawFn) -> Site:
    grid = draw(st.sampled_from([INT8, UINT8]))
    zero_point = draw(st.integers(grid.low, grid.high))
    first = draw(st.sampled_from([grid.low, zero_point]))
    last = draw(st.sampled_from([grid.high, draw(st.integers(first, grid.high))]))
    return site(grid, zero_point, first, last)


@law
@given(sites(), addends(), addends())
def test_all_pairs_of_integers_give_the_reference(
    of: Site, a: tuple[Grid, int, float], b: tuple[Grid, int, float]
) -> None:
    found, expected, _ = run(of, [a, b], pairs(a[0], b[0]))
    np.testing.assert_array_equal(found, expected)


def test_sums_as_networks_have_them_take_32_bits() -> None:
    """Factors of either addend from an eighth to one, any zero points."""
    random, slow = np.random.default_rng(0), 0
    for _ in range(30):
        zeros = random.integers(0, 256, 3)
        terms = [(UINT8, int(z), float(2.0 ** random.uniform(-3, 0))) for z in zeros[:2]]
        found, expected, nodes = run(site(UINT8, int(zeros[2])), terms, pairs(UINT8, UINT8))
        np.testing.assert_array_equal(found, expected)
        slow += [node.op for node in nodes] != FAST
    assert slow <= 1


def test_the_nodes_of_the_fast_form() -> None:
    terms = [(INT8, 3, 700 / 1023), (INT8, -5, -300 / 1023)]
    found, expected, nodes = run(site(INT8, 11, 11), terms, pairs(INT8, INT8))
    np.testing.assert_array_equal(found, expected)
    assert [node.op for node in nodes] == FAST
    assert {np.dtype(t.dtype).name for n in nodes[:-1] for t in n.outputs} == {"int32"}


def test_64_bits_where_no_division_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combination, "TRIALS", 0)
    for of in (site(INT8, -7), site(UINT8, 200, 200, 250)):
        terms = [(UINT8, 128, 0.37), (INT8, 5, -1.21)]
        found, expected, nodes = run(of, terms, pairs(UINT8, INT8))
        np.testing.assert_array_equal(found, expected)
        assert "Max" not in [node.op for node in nodes]


def test_factors_too_large_for_32_bits() -> None:
    """2^25 steps of the result each: no divisor leaves room."""
    terms = [(UINT8, 128, 2.0**25), (UINT8, 3, -(2.0**25))]
    found, expected, _ = run(site(UINT8, 7), terms, pairs(UINT8, UINT8))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("result", [INT8, UINT8, INT16, Grid(16, signed=False)])
@pytest.mark.parametrize("second", [INT8, INT16])
def test_16_bits(result: Grid, second: Grid) -> None:
    random: Any = np.random.default_rng(0)
    arrays = [random.integers(g.low, g.high + 1, 5000) for g in (INT16, second)]
    for array, grid in zip(arrays, (INT16, second), strict=True):
        array[:4] = grid.low, grid.high, grid.low, grid.high
    steps = 2.0 ** (result.bits - 17)
    terms = [(INT16, -300, 0.71 * steps), (second, 9, 3.3 * steps)]
    found, expected, _ = run(site(result, result.low + 99), terms, arrays)
    np.testing.assert_array_equal(found, expected)


def test_a_tensor_added_to_itself() -> None:
    graph = gs.Graph(opset=21)
    builder = Builder(graph, Names(graph), {})
    x = gs.Variable("x", np.int8, [256])
    graph.inputs = [x]
    value = builder.value(x, -128, 127)
    term = Term(value=value, zero_point=4, factor=0.6)
    result = emit(builder, [term, term], site(INT8, 0))
    graph.outputs = [result.tensor]
    q = np.arange(-128, 128)
    (found,) = Session(model_from_graph(graph), threads=1).run({"x": q.astype(np.int8)}).values()
    np.testing.assert_array_equal(found, np.clip(np.floor((q - 4) * 1.2 + 0.5), -128, 127))
