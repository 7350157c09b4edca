"""Comparisons, Boolean and bitwise operators, shifts, Where."""

from __future__ import annotations

from typing import Literal

import numpy as np

from onnx_intq.integer_ops.arithmetic import binary, unary
from onnx_intq.integer_ops.arrays import Array, Function


def _where(condition: Array, x: Array, y: Array) -> Array:
    return np.where(condition, x, y)


def _shift(a: Array, b: Array, *, direction: Literal["LEFT", "RIGHT"]) -> Array:
    """Shifted bits; a shift by a negative amount or by all bits leaves 0, or -1 where signed."""
    bits = 8 * a.dtype.itemsize
    # Two halves, neither of them by all bits, which C leaves undefined.
    amount = np.where((b < 0) | (b >= bits), bits, b).astype(np.int64)
    first, second = np.minimum(amount, bits - 1), amount // bits
    shift = np.left_shift if direction == "LEFT" else np.right_shift
    shifted: Array = shift(shift(a, first.astype(a.dtype)), second.astype(a.dtype))
    return shifted


OPS: dict[str, Function] = {
    "And": binary(np.logical_and),
    "BitShift": _shift,
    "BitwiseAnd": binary(np.bitwise_and),
    "BitwiseNot": unary(np.bitwise_not),
    "BitwiseOr": binary(np.bitwise_or),
    "BitwiseXor": binary(np.bitwise_xor),
    "Equal": binary(np.equal),
    "Greater": binary(np.greater),
    "GreaterOrEqual": binary(np.greater_equal),
    "Less": binary(np.less),
    "LessOrEqual": binary(np.less_equal),
    "Not": unary(np.logical_not),
    "Or": binary(np.logical_or),
    "Where": _where,
    "Xor": binary(np.logical_xor),
}
