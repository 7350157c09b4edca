"""Wrapping, narrowing and rounding to small types."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from onnx_intq.integer_ops.arrays import fitting, integer_range, numpy_dtype, reach, wrapped
from onnx_intq.integer_ops.cast import OPS, small_float

TYPES = [f"{sign}INT{bits}" for sign in ("", "U") for bits in (2, 4, 8, 16, 32, 64)]
laws = settings(derandomize=True, deadline=None, max_examples=100)
int64s = st.sampled_from([-(2**63), 2**63 - 1]) | st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize("name", TYPES)
@laws
@given(values=st.lists(int64s))
def test_wrapping_keeps_the_low_bits(name: str, values: list[int]) -> None:
    dtype = numpy_dtype(TensorProto.DataType.Value(name))
    low, high = integer_range(dtype)
    found = wrapped(np.array(values, np.int64), dtype)
    assert found.dtype == dtype
    for value, new in zip(values, map(int, found), strict=True):
        assert low <= new <= high
        assert (new - value) % (high - low + 1) == 0


@pytest.mark.parametrize("name", TYPES)
def test_only_what_fits_is_narrowed(name: str) -> None:
    dtype = numpy_dtype(TensorProto.DataType.Value(name))
    low, high = integer_range(dtype)
    ends = np.array([low, high], object)
    assert [int(value) for value in fitting(ends, dtype)] == [low, high]
    for outside in (low - 1, high + 1):
        with pytest.raises(OverflowError, match=f"leaves {dtype.name}"):
            fitting(np.array([0, outside], object), dtype)


@laws
@given(st.lists(int64s))
def test_reach_is_exact(values: list[int]) -> None:
    assert reach(np.array(values, np.int64)) == max(map(abs, values), default=0)


def test_floats_have_no_integer_range() -> None:
    with pytest.raises(TypeError, match="float32 values; expected integers"):
        integer_range(np.dtype(np.float32))


@pytest.mark.parametrize(
    ("name", "largest", "beyond"),
    [("FLOAT8E4M3FN", 448.0, np.nan), ("FLOAT8E5M2", 57344.0, np.inf)],
)
def test_small_floats_saturate_or_not(name: str, largest: float, beyond: float) -> None:
    element: int = TensorProto.DataType.Value(name)
    x = np.array([1e6, -1e6, np.nan, 1.0], np.float32)
    for saturate, want in (
        (1, [largest, -largest, np.nan, 1]),
        (0, [beyond, -beyond, np.nan, 1]),
    ):
        found: Any = OPS["Cast"](x, to=element, saturate=saturate)
        assert found.dtype == numpy_dtype(element)
        np.testing.assert_array_equal(found.astype(np.float32), want)
        direct = small_float(x, numpy_dtype(element), saturate=bool(saturate))
        np.testing.assert_array_equal(direct.astype(np.float32), want)


def test_floats_lose_their_fraction_towards_zero() -> None:
    found: Any = OPS["Cast"](np.array([1.9, -1.9], np.float32), to=TensorProto.INT8)
    assert found.tolist() == [1, -1]
