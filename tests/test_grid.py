import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_intq.grid import (
    LARGEST_SHIFT,
    SMALLEST_SCALE,
    Dyadic,
    Grid,
    affine,
    common_exponent,
    dequantize,
    dyadic,
    quantize,
    requantize,
    symmetric,
    weight_grid,
    weight_scales,
    weighted_sum,
)
from onnx_intq.transform import IntqError

law = settings(derandomize=True, deadline=None, max_examples=100)
reals = st.floats(-1e6, 1e6, width=32)
grids = st.sampled_from(
    [Grid(8, signed=False), Grid(8, signed=True), Grid(16, signed=False), Grid(16, signed=True)]
)
weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6),
    elements=st.floats(-8, 8, width=32),
)


def error(w: np.ndarray, axis: int | None, bits: int, method: str) -> np.ndarray:
    """Squared rounding error, one per channel."""
    scales = weight_scales(w, axis, bits, method)
    q = quantize(w, scales, 0, weight_grid(bits), axis)
    steps = scales.astype(np.float64)
    if axis is not None:
        steps = steps.reshape([-1 if i == axis else 1 for i in range(w.ndim)])
    others = tuple(i for i in range(w.ndim) if i != axis)
    found: np.ndarray = np.square(q * steps - w).sum(axis=others)
    return found


@pytest.mark.parametrize(
    ("grid", "low", "high", "dtype"),
    [
        (Grid(8, signed=True), -128, 127, np.int8),
        (Grid(8, signed=True, narrow=True), -127, 127, np.int8),
        (Grid(8, signed=False), 0, 255, np.uint8),
        (Grid(2, signed=True, narrow=True), -1, 1, np.int8),
        (Grid(5, signed=True), -16, 15, np.int8),
        (Grid(4, signed=False), 0, 15, np.uint8),
        (Grid(16, signed=True), -32768, 32767, np.int16),
        (Grid(16, signed=False), 0, 65535, np.uint16),
        (weight_grid(7), -63, 63, np.int8),
    ],
)
def test_bounds_and_storage(grid: Grid, low: int, high: int, dtype: type[np.integer]) -> None:
    assert (grid.low, grid.high, grid.dtype) == (low, high, np.dtype(dtype))
    assert np.iinfo(grid.dtype).min <= grid.low
    assert grid.high <= np.iinfo(grid.dtype).max


def test_seven_bit_weights_cannot_saturate_16_bit_sums() -> None:
    """Processors without VNNI add two products of u8 and s8 in 16 bits, and saturate."""
    activation = Grid(8, signed=False).high
    pair = [2 * activation * weight_grid(bits).high for bits in (7, 8)]
    assert pair == [32130, 64770]
    assert pair[0] <= np.iinfo(np.int16).max < pair[1]


def test_halves_are_rounded_to_even() -> None:
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    assert quantize(x, 1.0, 0, Grid(8, signed=True)).tolist() == [-2, -2, 0, 0, 2, 2]
    assert quantize(x, 1.0, 3, Grid(8, signed=False)).tolist() == [1, 1, 3, 3, 5, 5]


def test_values_beyond_the_grid_are_cut() -> None:
    x = np.array([-np.inf, -1e30, 1e30, np.inf], np.float32)
    assert quantize(x, 0.1, 0, weight_grid(8)).tolist() == [-127, -127, 127, 127]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale", [SMALLEST_SCALE, np.float32(0.1), np.float32(3e30)])
def test_every_integer_comes_back(bits: int, scale: np.float32) -> None:
    for grid in (Grid(bits, signed=True), Grid(bits, signed=False), weight_grid(bits)):
        q = np.arange(grid.low, grid.high + 1).astype(grid.dtype)
        for zero_point in (0, grid.high // 2):
            x = dequantize(q, scale, zero_point)
            assert x.dtype == np.float32
            np.testing.assert_array_equal(quantize(x, scale, zero_point, grid), q)


@law
@given(reals, reals, grids, st.data())
def test_a_value_in_range_moves_by_at_most_half_a_step(
    low: float, high: float, grid: Grid, data: st.DataObject
) -> None:
    low, high = min(low, high), max(low, high)
    scale, zero_point = (symmetric if grid.signed else affine)(low, high, grid)
    x = np.array([low, high, data.draw(st.floats(low, high, width=32))], np.float32)
    moved = np.abs(dequantize(quantize(x, scale, zero_point, grid), scale, zero_point) - x)
    # The scale is rounded by 2^-24 of itself, its multiple of at most 2^16 and x once more.
    slack = np.abs(x.astype(np.float64)) * 2.0**-22 + float(scale) * 2.0**-7
    assert (moved <= float(scale) / 2 + slack).all()


@law
@given(reals, reals, grids)
def test_zero_lies_on_the_grid(low: float, high: float, grid: Grid) -> None:
    scale, zero_point = (symmetric if grid.signed else affine)(min(low, high), max(low, high), grid)
    assert grid.low <= zero_point <= grid.high
    q = quantize(np.zeros(1, np.float32), scale, zero_point, grid)
    assert dequantize(q, scale, zero_point) == 0
    assert scale >= SMALLEST_SCALE
    assert isinstance(scale, np.float32)


def test_zero_points() -> None:
    grid = Grid(8, signed=False)
    assert affine(0, 6, grid) == (np.float32(6 / 255), 0)
    assert affine(2, 6, grid) == (np.float32(6 / 255), 0)
    assert affine(-6, -2, grid) == (np.float32(6 / 255), 255)
    assert affine(-1.28, 1.27, grid) == (np.float32(0.01), 128)
    assert affine(0, 0, grid) == (SMALLEST_SCALE, 0)
    assert symmetric(-6, 2, Grid(8, signed=True)) == (np.float32(6 / 127), 0)


def test_products_of_the_smallest_scales_are_normal() -> None:
    assert np.finfo(np.float32).smallest_normal <= SMALLEST_SCALE * SMALLEST_SCALE


def test_one_scale_per_channel() -> None:
    x = np.array([[1, 2], [3, 4]], np.float32)
    scales = np.array([1, 0.5], np.float32)
    for axis, expected in (0, [[1, 2], [6, 8]]), (1, [[1, 4], [3, 8]]), (-1, [[1, 4], [3, 8]]):
        q = quantize(x, scales, 0, weight_grid(8), axis)
        assert q.tolist() == expected
        np.testing.assert_array_equal(dequantize(q, scales, 0, axis), x)


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize(("axis", "shape"), [(None, ()), (0, (3,)), (1, (2,)), (-1, (4,))])
def test_shapes_of_weight_scales(method: str, axis: int | None, shape: tuple[int, ...]) -> None:
    w = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    scales = weight_scales(w, axis, 8, method)
    assert scales.shape == shape
    assert scales.dtype == np.float32


@law
@given(weights, st.sampled_from([None, 0, 1]), st.integers(2, 8))
def test_minmax_moves_every_weight_by_at_most_half_a_step(
    w: np.ndarray, axis: int | None, bits: int
) -> None:
    scales = weight_scales(w, axis, bits, "minmax")
    q = quantize(w, scales, 0, weight_grid(bits), axis)
    moved = np.abs(dequantize(q, scales, 0, axis).astype(np.float64) - w)
    half = (
        scales if axis is None else scales.reshape([-1 if i == axis else 1 for i in range(w.ndim)])
    )
    assert (moved <= half.astype(np.float64) / 2 * (1 + 2.0**-15)).all()


@law
@given(weights, st.sampled_from([None, 0, 1]), st.integers(2, 8))
def test_mse_is_never_worse_than_minmax(w: np.ndarray, axis: int | None, bits: int) -> None:
    assert (error(w, axis, bits, "mse") <= error(w, axis, bits, "minmax")).all()
    assert (weight_scales(w, axis, bits, "mse") <= weight_scales(w, axis, bits, "minmax")).all()


def test_mse_gains_where_a_few_weights_are_large() -> None:
    w = np.random.default_rng(0).standard_t(4, (4, 1000)).astype(np.float32)
    for bits, gain in ((2, 2.0), (3, 2.0), (4, 1.5), (6, 1.05)):
        assert (error(w, 0, bits, "minmax") > gain * error(w, 0, bits, "mse")).all()


def test_mse_finds_the_best_scale_of_a_normal_distribution() -> None:
    """The best step of a uniform quantizer with 2^b - 1 levels, by a fine search of its own."""
    w = np.random.default_rng(0).standard_normal((1, 20_000)).astype(np.float32)
    for bits in (2, 3, 4):
        grid = weight_grid(bits)
        steps = np.linspace(0.02, 1, 981)[:, None] * 4 / grid.high
        best = np.square(np.clip(np.rint(w / steps), grid.low, grid.high) * steps - w).sum(axis=1)
        assert error(w, 0, bits, "mse") <= 1.002 * best.min()


def test_dead_channels_get_a_scale() -> None:
    w = np.array([[0, 0], [1e-30, 0], [1, 2]], np.float32)
    for method in ("minmax", "mse"):
        scales = weight_scales(w, 0, 8, method)
        assert (scales[:2] == SMALLEST_SCALE).all()
        assert quantize(w, scales, 0, weight_grid(8), 0)[:2].tolist() == [[0, 0], [0, 0]]


multipliers = st.one_of(
    st.floats(0, 2.0**30 - 1),
    st.builds(math.ldexp, st.floats(0.5, 1), st.integers(-30, 29)),
    st.builds(lambda e, below: math.ldexp(1 - 2.0**-below, e), st.integers(-40, 29), st.just(53)),
)


@law
@given(multipliers, st.integers(8, 31), st.integers(20, LARGEST_SHIFT))
@example(math.nextafter(2.0**30 - 0.25, 0), 31, LARGEST_SHIFT)
@example(math.nextafter(1.0, 0), 31, LARGEST_SHIFT)
@example(0.0, 31, LARGEST_SHIFT)
def test_dyadic_multipliers_have_31_significant_bits(real: float, bits: int, largest: int) -> None:
    """Relative error at most 2^-bits; where c is at its limit, half of 2^-c absolute."""
    real = min(real, 2.0 ** (bits - 1) - 0.5)
    found = dyadic(real, largest, bits)
    b, c = int(found.b), int(found.c)
    assert 0 <= b < 1 << bits
    assert 1 <= c <= largest
    error = abs(Fraction(b, 1 << c) - Fraction(real))
    assert error <= Fraction(1, 1 << (c + 1))
    if c < largest:
        assert b >= 1 << (bits - 1)
        assert error <= Fraction(real) / (1 << bits) * (1 + Fraction(1, 1 << (bits - 1)))


def test_dyadic_multipliers_of_channels() -> None:
    reals = np.array([[0.0, 1.0], [0.75, 2.0**-60], [3.0, 2.0**-24]])
    found = dyadic(reals)
    assert found.b.shape == found.c.shape == reals.shape
    assert found.b.dtype == found.c.dtype == np.int64
    np.testing.assert_array_equal(np.ldexp(found.b, -found.c), np.where(reals < 2.0**-55, 0, reals))
    assert found.c.tolist() == [[54, 30], [31, 54], [29, 54]]


@pytest.mark.parametrize(
    "real", [-1e-9, np.nan, np.inf, -np.inf, 2.0**30, 2.0**30 - 0.25, [0.5, 2.0**31]]
)
def test_multipliers_out_of_range_are_refused(real: float | list[float]) -> None:
    with pytest.raises(IntqError, match=r"a requantisation by .*; expected a multiplier from 0 to"):
        dyadic(real)


def half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


wide = st.one_of(
    st.integers(-(1 << 31) + 1, (1 << 31) - 1),
    st.sampled_from([0, 1, -1, (1 << 31) - 1, 1 - (1 << 31)]),
)
dyadics = st.builds(
    lambda b, c: Dyadic(np.array(b), np.array(c)),
    st.one_of(st.integers(1 << 30, (1 << 31) - 1), st.integers(0, (1 << 31) - 1)),
    st.one_of(st.integers(1, LARGEST_SHIFT), st.just(LARGEST_SHIFT)),
)


@settings(law, max_examples=1000)
@given(st.lists(wide, min_size=1), wide, dyadics, st.integers(-128, 255), st.data())
def test_requantisation_is_exact(
    acc: list[int], bias: int, multiplier: Dyadic, zero_point: int, data: st.DataObject
) -> None:
    """Of every sum of an accumulator and a bias below 2^31, whatever the grid and the limits."""
    signed = zero_point < 0 or (zero_point <= 127 and data.draw(st.booleans()))
    grid = Grid(8, signed=signed)
    low = data.draw(st.integers(grid.low, grid.high))
    high = data.draw(st.integers(low, grid.high))
    acc = [min(max(a, 1 - (1 << 31) - bias), (1 << 31) - 1 - bias) for a in acc]
    limits = {"zero_point": zero_point, "low": low, "high": high}
    found = requantize(np.array(acc, np.int64), multiplier, bias=bias, **limits)
    assert found.dtype == np.int64
    factor = Fraction(int(multiplier.b), 1 << int(multiplier.c))
    for a, y in zip(acc, found, strict=True):
        exact = half_up((a + bias) * factor) + zero_point
        assert y == min(max(exact, low), high)


@law
@given(st.integers(-(1 << 31) + 1, (1 << 31) - 1), st.integers(0, (1 << 31) - 1))
def test_requantisation_to_16_bits_is_exact(acc: int, b: int) -> None:
    for signed, zero_point, c in ((True, -32768, 46), (False, 65535, 46), (True, 32767, 1)):
        grid = Grid(16, signed=signed)
        multiplier = Dyadic(np.array(b), np.array(c))
        limits = {"zero_point": zero_point, "low": grid.low, "high": grid.high}
        exact = half_up(Fraction(acc * b, 1 << c)) + zero_point
        found = requantize(np.int64(acc), multiplier, **limits)
        assert found == min(max(exact, grid.low), grid.high)


def test_channels_are_requantised_each_with_its_own_multiplier() -> None:
    acc = np.arange(-300, 300).reshape(1, 2, 300)
    multiplier = dyadic(np.array([[0.5], [2.0]]))
    bias = np.array([[7], [-9]])
    found = requantize(acc, multiplier, bias=bias, zero_point=3, low=-100, high=100)
    expected = np.floor((acc + bias) * np.array([[0.5], [2.0]]) + 0.5) + 3
    np.testing.assert_array_equal(found, np.clip(expected, -100, 100))


signed_factors = st.builds(
    lambda sign, size: sign * size, st.sampled_from([-1, 1]), st.floats(2.0**-40, 2.0**20)
)


@law
@given(st.lists(signed_factors, min_size=1, max_size=3), st.integers(30, LARGEST_SHIFT))
def test_factors_get_one_exponent(reals: list[float], largest: int) -> None:
    factors, c = common_exponent(reals, largest)
    assert 1 <= c <= largest
    for real, factor in zip(reals, factors, strict=True):
        assert abs(Fraction(factor, 1 << c) - Fraction(real)) <= Fraction(1, 1 << (c + 1))
    most = max(map(abs, factors))
    assert most < 1 << 31 or (most == 1 << 31 and min(factors) < 0)
    assert most >= 1 << 30 or c == largest


def test_a_factor_of_0_leaves_the_others_their_precision() -> None:
    factors, c = common_exponent([0.0, 2.0**-20, -(2.0**-21)])
    assert (factors, c) == ([0, 1 << 30, -(1 << 29)], 50)
    assert common_exponent([0.0]) == ([0], LARGEST_SHIFT)


@settings(law, max_examples=500)
@given(
    st.lists(st.tuples(st.integers(-65535, 65535), signed_factors), min_size=1, max_size=2),
    st.integers(-128, 255),
    st.data(),
)
def test_sums_are_rounded_once(
    pairs: list[tuple[int, float]], zero_point: int, data: st.DataObject
) -> None:
    bits = data.draw(st.sampled_from([8, 16]))
    grid = Grid(bits, signed=zero_point < 0)
    low = data.draw(st.integers(grid.low, grid.high))
    high = data.draw(st.integers(low, grid.high))
    factors, c = common_exponent([real for _, real in pairs], 62 - bits)
    terms = [np.array([term, 0], np.int64) for term, _ in pairs]
    limits = {"zero_point": zero_point, "low": low, "high": high}
    found = weighted_sum(terms, factors, c, **limits)
    total = sum(term * factor for (term, _), factor in zip(pairs, factors, strict=True))
    for y, exact in zip(found, (total, 0), strict=True):
        assert y == min(max(half_up(Fraction(exact, 1 << c)) + zero_point, low), high)
