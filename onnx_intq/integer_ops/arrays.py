"""Element types: ONNX's numbers as NumPy dtypes, the range of an integer type, its wrapping."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

Array = npt.NDArray[Any]
Result = Array | tuple[Array, ...]
Function = Callable[..., Result]
"""Computes a node: arrays and Python values in, one array per output out."""
EXACT = 1 << 53
"""float64 holds every integer up to this."""

_INTEGER = re.compile(r"(u?)int(\d+)")


def numpy_dtype(element_type: int) -> np.dtype[Any]:
    """The dtype of a `TensorProto.DataType`; that of ml_dtypes where NumPy has none."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element_type))


def is_integer(dtype: np.dtype[Any]) -> bool:
    """Whether this is an integer type; those below a byte, which are ml_dtypes', included."""
    return _INTEGER.fullmatch(dtype.name) is not None


def integer_range(dtype: np.dtype[Any]) -> tuple[int, int]:
    """The lowest and the highest value of an integer type.

    Raises:
        TypeError: `dtype` is no integer type.
    """
    found = _INTEGER.fullmatch(dtype.name)
    if found is None:
        raise TypeError(f"{dtype.name} values; expected integers")
    bits = int(found[2])
    return (0, (1 << bits) - 1) if found[1] else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def wrapped(x: Array, dtype: np.dtype[Any]) -> Array:
    """Integers in another integer type: the low bits, as two's complement (ONNX Cast)."""
    low, high = integer_range(dtype)
    if high - low < 255:  # ml_dtypes does not promise to keep the low bits
        x = ((x.astype(np.int64) - low) & (high - low)) + low
    return x.astype(dtype)


def reach(x: Array) -> int:
    """The largest absolute value of integers, exact; 0 for no values."""
    return max(-int(x.min()), int(x.max())) if x.size else 0


def centred(x: Array, zero_point: Array | None) -> npt.NDArray[np.int32]:
    """`x` less its zero point, int32; both have at most 16 bits and broadcast."""
    shifted = x.astype(np.int32)
    return shifted if zero_point is None else shifted - zero_point.astype(np.int32)


def fitting(x: npt.ArrayLike, dtype: npt.DTypeLike) -> Array:
    """`x` in a narrower integer type that must hold it.

    Raises:
        OverflowError: It does not.
    """
    x, dtype = np.asarray(x), np.dtype(dtype)
    low, high = integer_range(dtype)
    if x.size and not (low <= x.min() and x.max() <= high):
        raise OverflowError(f"a result of {x.min()} .. {x.max()} leaves {dtype.name}")
    return x.astype(dtype)
