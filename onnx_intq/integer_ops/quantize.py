"""Between real numbers and integers: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from onnx_intq.integer_ops.arrays import Array, Function, integer_range, is_integer, numpy_dtype
from onnx_intq.integer_ops.cast import small_float


def _along(parameter: Array, x: Array, axis: int, block_size: int) -> Array:
    """A scale or zero point so that it broadcasts with `x`: one, per channel, or per block."""
    if parameter.size == 1:
        return parameter.reshape(())
    if block_size:
        repeated = np.repeat(parameter, block_size, axis)
        return np.take(repeated, np.arange(x.shape[axis]), axis)
    return parameter.reshape(-1, *(1,) * (x.ndim - 1 - axis % x.ndim))


def _quantize(
    x: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: int = 1,
    precision: int = 0,
) -> Array:
    dtype = numpy_dtype(output_dtype or TensorProto.UINT8)
    zero: Array = np.zeros((), dtype) if zero_point is None else zero_point
    working = numpy_dtype(precision) if precision else scale.dtype
    ratio = x.astype(working) / _along(scale.astype(working), x, axis, block_size)
    zero = _along(zero, x, axis, block_size)
    if is_integer(zero.dtype):
        return rounded(ratio, zero)
    return small_float(ratio + zero.astype(working), zero.dtype, saturate=bool(saturate))


def rounded(real: Array, zero_point: Array) -> Array:
    """`real` rounded half to even, plus the zero point, saturated in the zero point's type.

    Not-a-number becomes the lowest value, as in onnxruntime; ONNX does not say.
    """
    low, high = integer_range(zero_point.dtype)
    # float64 holds any rounded float32 plus a zero point of 32 bits as far as the grid reaches.
    y = np.rint(real.astype(np.float64)) + zero_point.astype(np.float64)
    return (
        np.clip(np.where(np.isnan(y), low, y), low, high).astype(np.int64).astype(zero_point.dtype)
    )


def requantized(sums: Array, a: Array, b: Array, y: Array, zero_point: Array) -> Array:
    """int32 sums at scale a * b on the grid of scale y.

    onnxruntime's arithmetic, since ONNX fixes none: one float32 multiplier, one float32 product,
    rounded half to even (its MlasRequantizeOutput; measured equal, bit for bit).
    """
    multiplier = a.astype(np.float32) * b.astype(np.float32) / y.astype(np.float32)
    return rounded(sums.astype(np.float32) * multiplier, zero_point)


def _dequantize(
    x: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Array:
    dtype = numpy_dtype(output_dtype) if output_dtype else scale.dtype
    exact = np.int64 if is_integer(x.dtype) else np.float32
    shifted = x.astype(exact)
    if zero_point is not None:
        shifted = shifted - _along(zero_point, x, axis, block_size).astype(exact)
    # One rounding of the difference, one of the product, each in the output's type.
    real: Array = shifted.astype(dtype) * _along(scale, x, axis, block_size).astype(dtype)
    return real


def _dynamic_quantize(x: Array) -> tuple[Array, Array, Array]:
    low, high = np.minimum(x.min(), 0), np.maximum(x.max(), 0)
    scale = np.asarray((high - low) / np.float32(255) if high > low else 1, np.float32)
    zero_point = rounded(np.asarray(-low / scale), np.zeros((), np.uint8))
    return _quantize(x, scale, zero_point), scale, zero_point


OPS: dict[str, Function] = {
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "QuantizeLinear": _quantize,
}
