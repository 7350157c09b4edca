"""Matrix products of integers: MatMulInteger, QLinearMatMul, MatMul."""

from __future__ import annotations

import numpy as np

from onnx_intq.integer_ops.arrays import (
    EXACT,
    Array,
    Function,
    centred,
    fitting,
    is_integer,
    reach,
    wrapped,
)
from onnx_intq.integer_ops.quantize import requantized


def product(a: Array, b: Array) -> Array:
    """`a @ b` of integers in int64, modulo 2^64; exact where it fits.

    Args:
        a: [..., M, K] or [K], any integer type.
        b: [..., K, N] or [K], any integer type.
    """
    if reach(a) * reach(b) * a.shape[-1] < EXACT:
        # No partial sum can leave the integers float64 holds, so BLAS is exact in any order; NumPy
        # has no BLAS for integers, and is hundreds of times slower there.
        real: Array = np.matmul(a.astype(np.float64), b.astype(np.float64))
        return real.astype(np.int64)
    whole: Array = np.matmul(a.astype(np.int64), b.astype(np.int64))
    return whole


def _mat_mul(a: Array, b: Array) -> Array:
    if not is_integer(a.dtype):
        raise TypeError(f"{a.dtype.name} matrices; expected integers")
    return wrapped(product(a, b), a.dtype)


def _mat_mul_integer(
    a: Array, b: Array, a_zero_point: Array | None = None, b_zero_point: Array | None = None
) -> Array:
    left = centred(a, None if a_zero_point is None else _rows(a_zero_point))
    return fitting(product(left, centred(b, b_zero_point)), np.int32)


def _qlinear_mat_mul(
    a: Array,
    a_scale: Array,
    a_zero_point: Array,
    b: Array,
    b_scale: Array,
    b_zero_point: Array,
    y_scale: Array,
    y_zero_point: Array,
) -> Array:
    sums = _mat_mul_integer(a, b, a_zero_point, b_zero_point)
    return requantized(sums, _rows(a_scale), b_scale, _rows(y_scale), _rows(y_zero_point))


def _rows(parameter: Array) -> Array:
    """A zero point or scale with one value per row, beside the rows; others as they are."""
    return parameter[:, None] if parameter.ndim == 1 and parameter.size > 1 else parameter


OPS: dict[str, Function] = {
    "MatMul": _mat_mul,
    "MatMulInteger": _mat_mul_integer,
    "QLinearMatMul": _qlinear_mat_mul,
}
