"""Changes of the element type: Cast, CastLike, BitCast."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_intq.integer_ops.arrays import Array, Function, is_integer, numpy_dtype, wrapped


def small_float(x: Array, dtype: np.dtype[Any], *, saturate: bool) -> Array:
    """`x` rounded to a floating-point type below 16 bits, half to even.

    Args:
        x: Any floating-point type.
        dtype: One of ml_dtypes'.
        saturate: Whether what is too large becomes the largest value; else infinity or not-a-number
            as the type has it.
    """
    import ml_dtypes  # comes with the onnx versions that have these types

    if saturate:
        largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
        x = np.clip(x, -largest, largest)
    return x.astype(dtype)


def _converted(x: Array, dtype: np.dtype[Any], *, saturate: bool) -> Array:
    if is_integer(dtype):
        return wrapped(x if is_integer(x.dtype) else x.astype(np.int64), dtype)
    if dtype.itemsize == 1 and dtype != np.bool_:
        return small_float(x.astype(np.float32), dtype, saturate=saturate)
    return x.astype(dtype)


def _cast(x: Array, *, to: int, saturate: int = 1, round_mode: str = "up") -> Array:  # noqa: ARG001
    return _converted(x, numpy_dtype(to), saturate=bool(saturate))


def _cast_like(x: Array, like: Array, *, saturate: int = 1, round_mode: str = "up") -> Array:  # noqa: ARG001
    return _converted(x, like.dtype, saturate=bool(saturate))


def _bit_cast(x: Array, *, to: int) -> Array:
    return np.ascontiguousarray(x).reshape(x.shape).view(numpy_dtype(to))


OPS: dict[str, Function] = {
    "BitCast": _bit_cast,
    "Cast": _cast,
    "CastLike": _cast_like,
}
