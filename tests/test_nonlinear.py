from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import Names
from onnx_intq.grid import dyadic, requantize
from onnx_intq.lowering import GRIDS, Operand, Site
from onnx_intq.nonlinear import mode_named, multiplier_bits, onto_channels, requantized
from onnx_intq.runtime import Session
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import IntqError, PassError

law = settings(max_examples=100, deadline=None)
grids = st.sampled_from(sorted(GRIDS))


def symbol(low: int, high: int) -> Value:
    """An int64 input of a new graph."""
    graph = gs.Graph(opset=21)
    graph.inputs.append(gs.Variable("x", np.int64, ["n"]))
    return Builder(graph, Names(graph), {}).value(graph.inputs[0], low, high)


def site(dtype: str, scale: float, zero_point: int, first: int, last: int) -> Site:
    result = Operand(tensor=gs.Variable("q"), scale=scale, zero_point=zero_point, grid=GRIDS[dtype])
    return Site(node=gs.Node("Tanh"), bias=None, chain=(), result=result, first=first, last=last)


def computed(value: Value, x: Any) -> Any:
    graph = value.builder.graph
    graph.outputs = [value.tensor]
    model = gs.export_onnx(graph)
    model.ir_version = 10
    return next(iter(Session(model, threads=1).run({"x": x}).values())).astype(np.int64)


@law
@given(
    grid=grids,
    reach=st.integers(1, 33),
    exponent=st.floats(-4, 4),
    zero_point=st.integers(-128, 255),
    narrowed=st.booleans(),
)
def test_requantises_as_the_reference(
    grid: str, reach: int, exponent: float, zero_point: int, narrowed: bool
) -> None:
    """Kernels' results of up to 31 bits, products of up to 33: full scale is 2^exponent steps."""
    low, high = GRIDS[grid].low, GRIDS[grid].high
    first, last = (int(np.clip(zero_point, low, high)) if narrowed else low), high
    ends = (1 << reach) - 1
    scale = (high - low) / ends * 2.0**exponent
    x = symbol(-ends, ends)
    found = requantized(site(grid, 1.0, zero_point, first, last), x.builder, x, scale)
    random = np.random.default_rng(reach)
    integers = np.concatenate([random.integers(-ends, ends + 1, 500), [-ends, -1, 0, 1, ends]])
    multiplier = dyadic(scale, 62 - GRIDS[grid].bits, min(31, 62 - reach))
    expected = requantize(integers, multiplier, zero_point=zero_point, low=first, high=last)
    np.testing.assert_array_equal(computed(found, integers), expected)
    assert (found.low, found.high) == (first, last)


def test_wide_products_leave_bits_for_the_multiplier() -> None:
    assert multiplier_bits(symbol(0, (1 << 31) - 1)) == 31
    assert multiplier_bits(symbol(-(65535**2), 1)) == 30
    assert multiplier_bits(symbol(0, 1)) == 31


def test_scales_that_are_too_far_apart_are_refused() -> None:
    x = symbol(0, 255)
    with pytest.raises(IntqError, match=r"a requantisation by 1\.1259e\+15; expected a multiplier"):
        requantized(site("int8", 2.0**-50, 0, -128, 127), x.builder, x, 1.0)


def test_modes_have_names() -> None:
    assert [mode_named(name) for name in ("poly", "paper", "lut")] == ["poly", "paper", "lut"]
    with pytest.raises(PassError, match="mode 'float'; expected one of: poly, paper, lut"):
        mode_named("float")


@law
@given(
    factors=st.lists(st.tuples(st.floats(-40, 10), st.sampled_from([-1, 0, 1])), min_size=1),
    shift=st.floats(-(2.0**20), 2.0**20),
    y=st.integers(-(2**24), 2**24),
    grid=grids,
    zero_point=st.integers(-(2**15), 2**15),
)
def test_channels_are_rounded_once(
    factors: list[tuple[float, int]], shift: float, y: int, grid: str, zero_point: int
) -> None:
    """Half up, but for the roundings of factor and shift themselves."""
    low, high = GRIDS[grid].low, GRIDS[grid].high
    factor = np.array([sign * 2.0**exponent for exponent, sign in factors])
    shifts, values = np.full(len(factor), shift), np.full(len(factor), y)
    found = onto_channels(values, factor, shifts, zero_point=zero_point, low=low, high=high)
    real = y * factor + shift
    # The factor has 31 bits or 17 fractional ones, the shift 17.
    apart = 2.0**-30 * np.abs(y * factor) + 2.0**-17 * (1 + abs(y) * 2.0**-17)
    least, most = (np.floor(real + d + 0.5) + zero_point for d in (-apart, apart))
    assert (np.clip(least, low, high) <= found).all()
    assert (found <= np.clip(most, low, high)).all()


@law
@given(shift=st.sampled_from([2.0**43.9, -(2.0**43.9), 0.0]), grid=grids)
def test_the_farthest_shifts_fit_64_bits(shift: float, grid: str) -> None:
    low, high = GRIDS[grid].low, GRIDS[grid].high
    x = symbol(-(1 << 30), 1 << 30)
    limits = {"zero_point": low, "low": low, "high": high}
    found = onto_channels(x, np.array([2.0**9]), np.array([shift]), **limits)
    expected = high if shift > 0 else low
    assert (computed(found, np.array([0])) == expected).all()
    with pytest.raises(IntqError, match="its bias lies far outside the range of its result"):
        onto_channels(x, np.array([1.0]), np.array([2.0**44]), **limits)
