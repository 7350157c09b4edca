import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_intq.grid import (
    SMALLEST_SCALE,
    Grid,
    affine,
    dequantize,
    quantize,
    symmetric,
    weight_grid,
    weight_scales,
)

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
