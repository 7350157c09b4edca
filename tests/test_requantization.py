from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq import requantization
from onnx_intq.graph import Names, model_from_graph
from onnx_intq.grid import Dyadic, Grid, dyadic, requantize
from onnx_intq.requantization import WRAP, Division, Step, division, emit, friendly
from onnx_intq.runtime import Session
from onnx_intq.trace import Builder
from onnx_intq.transform import IntqError

law = settings(derandomize=True, deadline=None, max_examples=150)
LIMIT = (1 << 31) - 1
INT8, UINT8 = Grid(8, signed=True), Grid(8, signed=False)
TAIL = ["Add", "Div", "Clip", "Cast"]


def step(
    real: Any,
    low: Any = -3000,
    high: Any = 3000,
    *,
    bias: Any = 0,
    zero_point: int = 0,
    grid: Grid = UINT8,
    **limits: int,
) -> Step:
    """One channel per multiplier."""
    real = np.atleast_1d(np.asarray(real, np.float64))
    channels = [np.broadcast_to(v, real.shape).astype(np.int64) for v in (bias, low, high)]
    return Step(
        multiplier=dyadic(real, 62 - grid.bits),
        bias=channels[0],
        low=channels[1],
        high=channels[2],
        zero_point=zero_point,
        **({"first": grid.low, "last": grid.high} | limits),
    )


def expected(of: Step, acc: np.ndarray) -> np.ndarray:
    """`grid.requantize` of accumulators [channels, n]."""
    multiplier = Dyadic(of.multiplier.b[:, None], of.multiplier.c[:, None])
    limits = {"zero_point": of.zero_point, "low": of.first, "high": of.last}
    found: np.ndarray = requantize(acc, multiplier, bias=of.bias[:, None], **limits)
    return found


def divided(of: Step, base: int, found: Division, acc: np.ndarray) -> np.ndarray:
    """What the nodes compute: nothing leaves int32, and Div truncates."""
    factor, offset, divisor = (x[:, None] for x in (found.factor, found.offset, found.divisor))
    product = factor * acc
    total = product + offset
    for values in (factor, offset, divisor, product, total):
        assert np.abs(values).max(initial=0) <= LIMIT
    assert (divisor >= 1).all()
    quotient = np.sign(total) * (np.abs(total) // divisor)
    clipped: np.ndarray = np.clip(quotient, base, base + of.last - of.first)
    return clipped - base + of.first


def accumulators(of: Step) -> np.ndarray:
    """All there can be, or both ends and both sides of every step: [channels, n]."""
    low, high = of.low[:, None], of.high[:, None]
    if (high - low).max() <= 20_000:
        return np.minimum(low + np.arange((high - low).max() + 1), high)
    thresholds = of.thresholds()
    inner = np.random.default_rng(0).integers(low, high + 1, (len(low), 500))
    return np.concatenate([low, high, inner, *np.clip([thresholds - 1, thresholds], low, high)], 1)


def base_of(of: Step, grid: Grid) -> int:
    return of.first + (WRAP if grid.signed else 0)


def check(of: Step, grid: Grid) -> bool:
    """Whether there is a division; if so, it is `grid.requantize`."""
    base, acc = base_of(of, grid), accumulators(of)
    found = division(of, base)
    if found is None:
        return False
    np.testing.assert_array_equal(divided(of, base, found, acc), expected(of, acc))
    return True


reals = st.one_of(
    st.floats(-40, 12).map(lambda e: 2.0**e),
    st.integers(-40, 12).map(lambda e: 2.0**e),
    st.integers(1, 1 << 20).map(lambda d: 1 / d),
    st.builds(lambda d, j: 2.0**j / (2 * d + 1), st.integers(64, 5000), st.integers(0, 12)),
    st.builds(
        lambda d, e, sign: (1 + sign * 2.0**-e) / d,
        st.integers(1, 1 << 16),
        st.floats(6, 45),
        st.sampled_from([-1, 1]),
    ),
    st.just(0.0),
)


@st.composite
def channels(draw: st.DrawFn, widest: int) -> tuple[float, int, int, int]:
    """Multiplier, lowest and highest accumulator, bias."""
    span = draw(st.integers(0, draw(st.sampled_from([1, 300, widest]))))
    place = max(draw(st.sampled_from([span, span, 1 << 20, LIMIT])), span - LIMIT)
    low = draw(st.integers(max(-place, -LIMIT), min(place, LIMIT - span)))
    reach = draw(st.sampled_from([0, span, 1 << 20, LIMIT]))
    bias = draw(st.integers(-reach, reach))
    return draw(reals), low, low + span, min(max(bias, -LIMIT - low), LIMIT - low - span)


@st.composite
def steps(draw: st.DrawFn, widest: int) -> tuple[Step, Grid]:
    grid = draw(st.sampled_from([INT8, UINT8]))
    of = draw(st.lists(channels(widest), min_size=1, max_size=6))
    zero_point = draw(st.integers(grid.low, grid.high))
    first = draw(st.sampled_from([grid.low, zero_point, draw(st.integers(grid.low, grid.high))]))
    last = draw(st.sampled_from([grid.high, draw(st.integers(first, grid.high))]))
    real, low, high, bias = (list(column) for column in zip(*of, strict=True))
    limits = {"zero_point": zero_point, "first": first, "last": last}
    return step(real, low, high, bias=bias, grid=grid, **limits), grid


@law
@given(steps(20_000))
def test_a_division_is_the_reference_for_every_accumulator(drawn: tuple[Step, Grid]) -> None:
    check(*drawn)


@law
@given(steps(2 * LIMIT))
def test_a_division_is_the_reference_at_every_step(drawn: tuple[Step, Grid]) -> None:
    check(*drawn)


@law
@given(steps(2 * LIMIT))
def test_thresholds_are_where_the_result_rises(drawn: tuple[Step, Grid]) -> None:
    of, _ = drawn
    thresholds = of.thresholds()
    assert thresholds.shape == (len(of.bias), of.last - of.first)
    levels = np.broadcast_to(np.arange(of.first + 1, of.last + 1), thresholds.shape)
    seen = (thresholds + of.bias[:, None] < 1 << 31) & (thresholds + of.bias[:, None] > -1 << 31)
    seen &= of.multiplier.b[:, None] > 0
    at, below = (expected(of, np.where(seen, t, 0)) for t in (thresholds, thresholds - 1))
    assert (at[seen] >= levels[seen]).all()
    assert (below[seen] < levels[seen]).all()


def test_nearly_all_channels_have_a_division() -> None:
    """Convolutions: the accumulators cover the result's grid up to 32 times.

    A few channels have none before their multiplier is moved, up or down, by 2^-20 of it at most.
    """
    random, missing, count = np.random.default_rng(0), 0, 300
    moves: list[Any] = []
    for grid in (INT8, UINT8):
        span = 2.0 ** random.uniform(10, 25, count)
        low = -np.floor(span * random.uniform(0, 1, count))
        real = 255 / span * 2.0 ** random.uniform(-1, 5, count)
        bias = np.rint(random.standard_normal(count) * span / 8)
        zero_point = 0 if grid.signed else 128
        of = step(real, low, np.floor(low + span), bias=bias, zero_point=zero_point, grid=grid)
        moved = friendly(of, base_of(of, grid))
        for channel in range(count):
            alone = requantization._only(moved, np.array([channel]))
            missing += not check(alone, grid)
        relative = moved.multiplier.b / of.multiplier.b - 1
        moves += [m for m in relative if m]
    assert missing <= 1
    assert 5 <= len(moves) <= 60
    assert -(2.0**-20) <= min(moves) < 0 < max(moves) <= 2.0**-20


@pytest.mark.parametrize("grid", [INT8, UINT8])
def test_few_accumulators_anywhere(grid: Grid) -> None:
    """Ranges of up to three steps: one or two are reached, and the rest does not matter."""
    for seed in range(8):
        random = np.random.default_rng(seed)
        width = 2.0 ** random.uniform(-1, 9, 500)
        low = np.rint(random.standard_normal(500) * 2.0 ** random.uniform(0, 16, 500))
        span = np.ceil(width * random.uniform(0, 3, 500)) + 1
        zero_point = int(random.integers(grid.low, grid.high + 1))
        place = (random.integers(grid.low, grid.high + 1, 500) - zero_point) * width
        bias = np.floor(place) - low - random.integers(0, span)
        of = step(1 / width, low, low + span, bias=bias, zero_point=zero_point, grid=grid)
        assert check(of, grid)


def test_what_cannot_be_helped_is_left_as_it_is() -> None:
    """Accumulators next to 2^31 leave no room for a factor, and 1 / 8 is not 0.123."""
    of = step([0.123, 0.123], [LIMIT - 3000, -1500], [LIMIT, 1500], bias=[1500 - LIMIT, 0])
    moved = friendly(of, 0)
    assert (moved.multiplier.b == of.multiplier.b).all()
    assert division(of, 0) is None
    found, ops = run(of, UINT8, accumulators(of))
    np.testing.assert_array_equal(found, expected(of, accumulators(of)))
    assert ops == ["Cast", "Mul", "Add", "Cast", "BitShift", "Cast", "Add", "Clip", "Cast"]


@law
@given(steps(1 << 26))
def test_friendly_moves_only_what_has_no_division_and_little(drawn: tuple[Step, Grid]) -> None:
    of, grid = drawn
    moved = friendly(of, base_of(of, grid))
    assert replace(moved, multiplier=of.multiplier) == of
    assert (moved.multiplier.c == of.multiplier.c).all()
    b = moved.multiplier.b
    assert (b >= 0).all()
    assert (b < 1 << 31).all()
    change = np.abs(b - of.multiplier.b)
    assert (change <= of.multiplier.b * 2.0**-20).all()
    for channel in range(len(of.bias)):
        before, after = (requantization._only(s, np.array([channel])) for s in (of, moved))
        if check(before, grid):
            assert not change[channel]
        elif change[channel]:
            assert check(after, grid)


def test_a_multiplier_at_the_edge_of_31_bits_stays_below() -> None:
    """2^31 - 1 and steps that fall on whole accumulators."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        low, bias = -random.integers(1 << 20, 1 << 22, 40), random.integers(-9999, 9999, 40)
        of = step(np.full(40, (2.0**31 - 1) / 2**45), low, -low, bias=bias, zero_point=100)
        moved = friendly(of, 0)
        assert (moved.multiplier.b < 1 << 31).all()


def test_channels_whose_result_is_constant() -> None:
    """Dead ones, those far outside the grid, and results with one integer only."""
    of = step([0, 1e-12, 0.5, 0.5], 100, 5000, bias=[0, 9, 1 << 30, -(1 << 30)], zero_point=7)
    found = division(of, 0)
    assert found is not None
    assert found.factor.tolist() == [0, 0, 0, 0]
    assert found.offset.tolist() == [7, 7, 255, 0]
    assert check(of, UINT8)
    assert check(step([0.3, 0.1], first=20, last=20), UINT8)
    assert check(step([0.3, 0.1], first=-5, last=-5, grid=INT8), INT8)


def run(
    of: Step, grid: Grid, acc: np.ndarray, target: str = "integer"
) -> tuple[np.ndarray, list[str]]:
    """Results of the emitted graph for accumulators [channels, n], and its operators."""
    x = gs.Variable("acc", np.int32, (1, *acc.shape))
    graph = gs.Graph(inputs=[x], opset=21)
    builder = Builder(graph, Names(graph), {}, target=target)
    value = builder.value(x, int(of.low.min()), int(of.high.max()))
    result = emit(value, of, grid, (len(of.bias), 1))
    assert (result.low, result.high) == (of.first, of.last)
    assert result.dtype == grid.dtype
    graph.outputs = [result.tensor]
    session = Session(model_from_graph(graph), threads=1)
    (found,) = session.run({"acc": acc[None].astype(np.int32)}).values()
    return found[0], [node.op for node in graph.nodes]


@settings(law, max_examples=60)
@given(steps(1 << 24))
def test_onnxruntime_gives_the_reference(drawn: tuple[Step, Grid]) -> None:
    of, grid = drawn
    moved, acc = friendly(of, base_of(of, grid)), accumulators(of)
    try:
        found, ops = run(of, grid, acc)
    except IntqError as error:  # bias and zero point at their ends, in 64 bits
        assert "leave the integers' range" in str(error)  # noqa: PT017
        assert division(moved, base_of(of, grid)) is None
        return
    np.testing.assert_array_equal(found, expected(moved, acc))
    if division(moved, base_of(of, grid)) is not None:
        assert [op for op in ops if op != "Mul"] == TAIL


@pytest.mark.parametrize("grid", [INT8, UINT8])
def test_the_nodes_of_the_fast_form(grid: Grid) -> None:
    whole = step([1 / 301, 1 / 517], -40_000, 40_000, zero_point=grid.high - 127, grid=grid)
    acc = accumulators(whole)
    found, ops = run(whole, grid, acc)
    assert ops == TAIL  # all factors are 1
    np.testing.assert_array_equal(found, expected(whole, acc))
    broken = step([1 / 301, 0.0123], -40_000, 40_000, zero_point=grid.high - 127, grid=grid)
    found, ops = run(broken, grid, acc)
    assert ops == ["Mul", *TAIL]
    np.testing.assert_array_equal(found, expected(broken, acc))


@pytest.mark.parametrize("grid", [INT8, UINT8])
def test_no_cast_wraps_for_tensorrt(grid: Grid) -> None:
    for first in (grid.low, grid.low + 40):
        of = step([1 / 301, 1 / 517], -40_000, 40_000, zero_point=grid.low + 90, grid=grid)
        of = replace(of, first=first)
        acc = accumulators(of)
        found, ops = run(of, grid, acc, "tensorrt")
        assert ops == ["Add", "Div", "Clip", *["Sub"] * grid.signed, "Cast"]
        np.testing.assert_array_equal(found, expected(of, acc))


@pytest.mark.parametrize("grid", [INT8, UINT8])
def test_64_bits_where_there_is_no_division(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also products of 2^31 .. 2^32, which onnxruntime's Max of int64 takes for negative."""
    monkeypatch.setattr(requantization, "division", lambda *_: None)
    monkeypatch.setattr(requantization, "friendly", lambda of, _: of)
    bias = np.array([0, 5, -70_000, 1 << 30, 300, 0])
    reals = np.array([0.75, 1.99, 0.01, 1e-7, 1000, 0])
    of = step(reals, -40_000, 40_000, bias=bias, zero_point=grid.low + 3, grid=grid)
    acc = accumulators(of)
    found, ops = run(of, grid, acc)
    np.testing.assert_array_equal(found, expected(of, acc))
    assert "Div" in ops
    assert "Max" not in ops


@pytest.mark.parametrize("grid", [Grid(16, signed=True), Grid(16, signed=False)])
def test_16_bit_results(grid: Grid) -> None:
    of = step(
        [0.75, 1.5, 0.01, 1 / 3],
        -(1 << 24),
        1 << 24,
        bias=[0, 7, -(1 << 28), 1000],
        zero_point=grid.low + 40_000,
        grid=grid,
        first=grid.low + 5,
    )
    acc = np.random.default_rng(0).integers(-(1 << 24), 1 << 24, (4, 5000))
    acc[:, :2000] >>= 8
    found, _ = run(of, grid, acc)
    np.testing.assert_array_equal(found, expected(of, acc))


def test_one_entry_does_for_all() -> None:
    of = step(0.0123, -9000, 9000, zero_point=40)
    found, _ = run(of, UINT8, accumulators(of))
    np.testing.assert_array_equal(found, expected(of, accumulators(of)))
    x = gs.Variable("acc", np.int32, (2, 3))
    graph = gs.Graph(inputs=[x], opset=21)
    result = emit(Builder(graph, Names(graph), {}).value(x, -9000, 9000), of, UINT8, ())
    assert tuple(result.tensor.shape) == (2, 3)


@pytest.mark.parametrize(
    ("low", "high", "bias"),
    [(0, 1 << 31, 0), (0, 1 << 31, -100), (-(1 << 31), 0, 5)],
)
def test_accumulators_beyond_32_bits_are_refused(low: int, high: int, bias: int) -> None:
    message = "an accumulator exceeds 32 bits; expected fewer or smaller products; keep the node"
    with pytest.raises(IntqError, match=message):
        run(step([0.5, 0.01], [0, low], [1, high], bias=[0, bias]), UINT8, np.zeros((2, 1), int))
