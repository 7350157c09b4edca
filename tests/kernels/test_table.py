import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.grid import Grid, dequantize, quantize
from onnx_intq.kernels.table import Function, lookup, table
from onnx_intq.transform import IntqError

law = settings(derandomize=True, deadline=None, max_examples=100)
FUNCTIONS: list[Function] = [np.tanh, np.exp, np.sin, np.abs, lambda x: x / (1 + np.exp(-x))]
GRIDS = [Grid(8, signed=False), Grid(8, signed=True), Grid(16, signed=True)]


def entries(function: Function, scale: float = 0.25, out_scale: float = 1.0) -> np.ndarray:
    """Over -2..2, to 8 bits."""
    return table(function, scale, 0, -2, 2, out_scale, 0, -128, 127)


@law
@given(
    function=st.sampled_from(FUNCTIONS),
    in_grid=st.sampled_from(GRIDS),
    out_grid=st.sampled_from(GRIDS),
    in_scale=st.floats(2.0**-20, 16),
    out_scale=st.floats(2.0**-20, 16),
    data=st.data(),
)
def test_a_lookup_is_dequantize_compute_quantize(
    function: Function,
    in_grid: Grid,
    out_grid: Grid,
    in_scale: float,
    out_scale: float,
    data: st.DataObject,
) -> None:
    """For all integers of the input's grid."""
    in_zero, out_zero = (data.draw(st.integers(g.low, g.high)) for g in (in_grid, out_grid))
    q = np.arange(in_grid.low, in_grid.high + 1)
    ends = in_zero, in_grid.low, in_grid.high, out_scale, out_zero, out_grid.low, out_grid.high
    found = lookup(q, table(function, in_scale, *ends), in_grid.low)
    with np.errstate(over="ignore"):
        y = np.asarray(function((q - in_zero) * np.float64(in_scale)), np.float64)
        expected = quantize(y, out_scale, out_zero, out_grid)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int64


def test_halves_are_rounded_to_even() -> None:
    assert entries(lambda x: x, scale=0.5).tolist() == [-1, 0, 0, 0, 1]


def test_the_identity_gives_every_integer_back() -> None:
    grid = Grid(8, signed=False)
    q = np.arange(256)
    found = table(lambda x: x, 0.1, 128, 0, 255, 0.1, 128, 0, 255)
    np.testing.assert_array_equal(found, q)
    x = dequantize(q.astype(grid.dtype), 0.1, 128)
    np.testing.assert_array_equal(quantize(x, 0.1, 128, grid), found)


def test_infinite_values_saturate() -> None:
    with np.errstate(divide="ignore"):
        assert entries(lambda x: np.log(np.abs(x)), out_scale=0.1).tolist()[2] == -128
    assert entries(lambda x: np.where(x > 0, np.inf, -np.inf)).tolist() == [-128] * 3 + [127] * 2
    assert entries(np.exp, scale=1000.0).tolist() == [0, 0, 1, 127, 127]


def test_no_value_is_an_error() -> None:
    with pytest.raises(IntqError, match=r"at -0\.5 \(integer -2\); expected .* grid -2\.\.2; cal"):
        entries(np.log)
    assert entries(lambda x: np.sqrt(np.maximum(x, 0)), out_scale=math.sqrt(0.5) / 127)[-1] == 127


def test_any_shape_is_looked_up() -> None:
    found = lookup(np.array([[-2, 2], [0, 1]]), entries(lambda x: 4 * x), -2)
    assert found.tolist() == [[-2, 2], [0, 1]]
