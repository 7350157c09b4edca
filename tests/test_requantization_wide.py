"""Requantisation in int64: accumulators of over 31 bits, and what no int32 division follows."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq import requantization
from onnx_intq.graph import Names, model_from_graph
from onnx_intq.grid import Dyadic, Grid, dyadic, requantize
from onnx_intq.requantization import Step, emit, fitted
from onnx_intq.runtime import Session
from onnx_intq.trace import Builder
from onnx_intq.transform import IntqError

law = settings(deadline=None, max_examples=150)
INT8, UINT8 = Grid(8, signed=True), Grid(8, signed=False)
INT16, UINT16 = Grid(16, signed=True), Grid(16, signed=False)


def step(
    real: Any, low: Any, high: Any, *, bias: Any = 0, zero_point: int = 0, grid: Grid = UINT8
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
        first=grid.low,
        last=grid.high,
    )


def accumulators(of: Step) -> Any:
    """Both ends, those next to no bias at all, and others: [channels, n]."""
    random, (low, high) = np.random.default_rng(0), (of.low[:, None], of.high[:, None])
    inner = random.integers(low, high + 1, (len(low), 500))
    edges = -of.bias[:, None] + random.integers(-9, 10, (len(low), 50))
    return np.concatenate([low, high, inner, np.clip(edges, low, high)], axis=1)


def expected(of: Step, acc: Any) -> Any:
    """`grid.requantize` of accumulators [channels, n]."""
    multiplier = Dyadic(of.multiplier.b[:, None], of.multiplier.c[:, None])
    limits = {"zero_point": of.zero_point, "low": of.first, "high": of.last}
    return requantize(acc, multiplier, bias=of.bias[:, None], **limits)


def run(of: Step, grid: Grid, acc: Any, target: str = "integer") -> tuple[Any, list[str]]:
    """Results of the emitted graph for accumulators [channels, n], and its operators."""
    x = gs.Variable("acc", np.int64, (1, *acc.shape))
    graph = gs.Graph(inputs=[x], opset=21)
    builder = Builder(graph, Names(graph), {}, target=target)
    value = builder.value(x, int(of.low.min()), int(of.high.max()))
    result = emit(value, of, grid, (len(of.bias), 1))
    assert (result.low, result.high, result.dtype) == (of.first, of.last, grid.dtype)
    graph.outputs = [result.tensor]
    (found,) = Session(model_from_graph(graph), threads=1).run({"acc": acc[None]}).values()
    return found[0], [node.op for node in graph.nodes]


@st.composite
def wide_steps(draw: st.DrawFn) -> tuple[Step, Grid]:
    """Accumulators of up to 41 bits with their bias, some of their results on the grid."""
    grid = draw(st.sampled_from([INT8, UINT8, INT16, UINT16]))
    bits = draw(st.integers(24, 39))
    channels = draw(st.integers(1, 4))
    low, high = (
        [draw(st.integers(0, 1 << bits)) * sign for _ in range(channels)] for sign in (-1, 1)
    )
    reach = [0, 1 << 31, 1 << bits]
    bias = [draw(st.integers(-1, 1)) * draw(st.sampled_from(reach)) for _ in range(channels)]
    real = [2.0 ** draw(st.floats(grid.bits - bits - 9, grid.bits - bits + 3)) for _ in bias]
    zero_point = draw(st.sampled_from([grid.low, 0, grid.high]))
    return step(real, low, high, bias=bias, zero_point=zero_point, grid=grid), grid


@law
@given(wide_steps(), st.sampled_from(["integer", "tensorrt"]))
def test_wide_accumulators_are_exact(drawn: tuple[Step, Grid], target: str) -> None:
    of, grid = drawn
    moved, acc = fitted(of), accumulators(of)
    found, ops = run(of, grid, acc, target)
    if "BitShift" in ops or "Where" in ops:  # else a division, of a friendly step
        np.testing.assert_array_equal(found, expected(moved, acc))
    assert ("BitShift" in ops) <= (target == "integer")


@law
@given(wide_steps())
def test_multipliers_leave_room_for_wide_accumulators(drawn: tuple[Step, Grid]) -> None:
    """Their product with an accumulator and its bias stays below 2^62, and little is rounded."""
    of, _ = drawn
    moved = fitted(of)
    before, after = (
        [Fraction(int(b), 1 << int(c)) for b, c in zip(m.b, m.c, strict=True)]
        for m in (of.multiplier, moved.multiplier)
    )
    for one, other in zip(before, after, strict=True):
        assert abs(one - other) <= one * Fraction(1, 1 << 21)
    largest = np.maximum(np.abs(of.low), np.abs(of.high)).max()
    summed = np.abs([of.low + of.bias, of.high + of.bias]).max()
    if max(largest, summed) < 1 << 31:
        assert moved is of
    else:
        whole = int(largest) + int(np.abs(of.bias).max())
        assert whole * int(moved.multiplier.b.max()) < 1 << 62
    assert replace(moved, multiplier=of.multiplier) == of


def test_a_multiplier_that_rounds_up_to_another_bit() -> None:
    of = step(np.nextafter(0.5, 0), -(1 << 39), 1 << 39)
    assert of.multiplier.b.tolist() == [1 << 30]
    of = replace(of, multiplier=Dyadic(np.array([(1 << 31) - 1]), np.array([32])))
    moved = fitted(of).multiplier
    assert (moved.b.tolist(), moved.c.tolist()) == ([1 << 21], [22])


def test_accumulators_beyond_41_bits_are_refused() -> None:
    whole = step(0.5, -(1 << 40), (1 << 40) - 1, bias=1 << 40)
    with pytest.raises(IntqError, match="an accumulator exceeds 41 bits; expected fewer"):
        fitted(replace(whole, low=whole.low - 1, bias=whole.bias + 5))
    fitted(step(0.5, 1 - (1 << 40), 0, bias=1 << 40))


def test_a_search_that_cannot_end_well_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2^18 accumulators, as inputs of 16 bits have them: no channel has a division."""

    def unwanted(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(requantization, "friendly", unwanted)
    width = np.linspace(250_000, 300_000, 64)
    of = step(1 / width, -(1 << 29), 1 << 29, bias=777, zero_point=128)
    acc = accumulators(of)
    found, ops = run(of, UINT8, acc)
    np.testing.assert_array_equal(found, expected(of, acc))
    assert "BitShift" in ops


def test_what_a_shift_cannot_hold_is_compared_and_divided() -> None:
    """A result of over 30 bits before it is cut."""
    of = step([0.9, 300.0], -(1 << 28), 1 << 28, zero_point=3, grid=INT16)
    acc = accumulators(of)
    found, ops = run(of, INT16, acc)
    np.testing.assert_array_equal(found, expected(of, acc))
    assert "Where" in ops
