"""Quantization arithmetic in NumPy: integer grids, scales, rounding. The reference for everything.

A value x lies on a grid as q = clip(round_half_even(x / scale) + zero_point, low, high)
(Q-ASR section 2.1; ONNX QuantizeLinear).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_intq.transform import IntqError

Float = npt.NDArray[np.floating[Any]]
Integer = npt.NDArray[np.integer[Any]]

SMALLEST_SCALE = np.float32(2.0**-60)
"""Scales are at least this, so that the product of two of them is a normal float32."""


@dataclass(frozen=True)
class Grid:
    """The integers of `bits` bits, signed or not.

    `narrow` leaves out the lowest signed value, so that the grid is symmetric: used for weights
    (products of two -128 would overflow the int16 pairs of some processors' dot products).
    """

    bits: int
    signed: bool
    narrow: bool = False

    @property
    def low(self) -> int:
        """The lowest integer of the grid."""
        return -(1 << (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def high(self) -> int:
        """The highest integer of the grid."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest NumPy integer type that stores the grid."""
        return np.dtype(f"{'' if self.signed else 'u'}int{8 if self.bits <= 8 else 16}")


def weight_grid(bits: int) -> Grid:
    """The symmetric grid of weights: -(2^(bits-1) - 1) .. 2^(bits-1) - 1."""
    return Grid(bits, signed=True, narrow=True)


def symmetric(low: float, high: float, grid: Grid) -> tuple[np.float32, int]:
    """Scale and zero point 0 of a signed grid that covers [low, high]."""
    return _scale(max(abs(low), abs(high)) / grid.high), 0


def affine(low: float, high: float, grid: Grid) -> tuple[np.float32, int]:
    """Scale and zero point of an unsigned grid that covers [min(low, 0), max(high, 0)].

    The zero point is 0 for non-negative tensors; real 0 always lies on the grid exactly.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = _scale((high - low) / (grid.high - grid.low))
    return scale, int(np.clip(np.rint(-low / np.float64(scale)), grid.low, grid.high))


def quantize(
    x: Float, scale: npt.ArrayLike, zero_point: int, grid: Grid, axis: int | None = None
) -> Integer:
    """Round `x` (any shape) to `grid`; `scale` is a scalar or has one value per index of `axis`."""
    q = np.rint(x / _along(np.asarray(scale, np.float64), x.ndim, axis)) + zero_point
    rounded: Integer = np.clip(q, grid.low, grid.high).astype(grid.dtype)
    return rounded


def dequantize(
    q: Integer, scale: npt.ArrayLike, zero_point: int, axis: int | None = None
) -> npt.NDArray[np.float32]:
    """The real values of `q`, float32: (q - zero_point) * scale."""
    real = (q.astype(np.int64) - zero_point).astype(np.float32)
    return (real * _along(np.asarray(scale, np.float32), q.ndim, axis)).astype(np.float32)


def weight_scales(
    w: Float, axis: int | None, bits: int, method: str = "mse"
) -> npt.NDArray[np.float32]:
    """Symmetric scales of a weight tensor, one per index of `axis` (a scalar without axis).

    Args:
        w: Weights, any shape.
        axis: The output-channel axis, None for one scale.
        bits: Width of the grid, 2..8.
        method: "minmax" covers the largest weight (Q-ASR); "mse" shrinks that scale by the factor
            that makes the channel's squared rounding error smallest.

    Returns:
        float32, shape [channels] or [].
    """
    rows = (
        np.reshape(w, (1, -1))
        if axis is None
        else np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
    )
    rows = rows.astype(np.float64)
    grid = weight_grid(bits)
    scales = _float32_scales(np.abs(rows).max(axis=1) / grid.high)
    if method == "mse":
        scales = _smallest_error(rows, scales, grid)
    return scales.reshape(()) if axis is None else scales


@dataclass(frozen=True)
class Dyadic:
    """The multiplier b / 2^c of integer requantisation (Q-ASR section 2.2, HAWQ-V3).

    Attributes:
        b: int64, scalar or any shape that broadcasts; 0 <= b < 2^31, and >= 2^30 where c < 54.
        c: int64, the shape of `b`; 1 <= c <= 54.
    """

    b: Integer
    c: Integer


MULTIPLIER_BITS = 31
LARGEST_SHIFT = 54
"""(acc + bias) * b < 2^62 and 255 * 2^54 < 2^62: their sum and the half fit int64."""


def dyadic(
    real: npt.ArrayLike, largest_shift: int = LARGEST_SHIFT, bits: int = MULTIPLIER_BITS
) -> Dyadic:
    """The nearest b / 2^c to `real`, `bits` significant bits.

    Args:
        real: Multipliers, >= 0 and < 2^(bits - 1), any shape.
        largest_shift: c is at most this; below 2^(bits - 1 - largest_shift), b has fewer bits.
        bits: Of b, at most 31: fewer leave room for an accumulator of more than 31 bits.

    Raises:
        IntqError: A multiplier is negative, not finite, or 2^(bits - 1) or more.
    """
    values = np.asarray(real, np.float64)
    # Above, b would be rounded up to 2^bits, and c is not there to make up for it.
    inside = (values >= 0) & (values < 2.0 ** (bits - 1) - 0.25)
    if not np.all(inside):
        raise IntqError(
            f"a requantisation by {values[~inside].flat[0]:g}; "
            f"expected a multiplier from 0 to 2^{bits - 1}; "
            "calibrate again: two scales of the model are too far apart"
        )
    exponents = np.where(values > 0, np.frexp(values)[1], -largest_shift)
    c = np.clip(bits - exponents.astype(np.int64), 1, largest_shift)
    b = np.floor(np.ldexp(values, c) + 0.5).astype(np.int64)
    too_large = b >= 1 << bits  # the mantissa was rounded up to 1
    return Dyadic(np.where(too_large, b >> 1, b), np.where(too_large, c - 1, c))


def requantize(
    acc: Any,
    multiplier: Dyadic,
    *,
    bias: npt.ArrayLike = 0,
    zero_point: int = 0,
    low: int,
    high: int,
) -> Any:
    """clip((((acc + bias) * b + 2^(c-1)) >> c) + zero_point, low, high): half up, exact in int64.

    Args:
        acc: int64 array or a `trace.Value`; |acc| and |acc + bias| < 2^31, or 2^62 / b.
        multiplier: Broadcasts to `acc`.
        bias: Integers that broadcast to `acc`, |bias| < 2^31, or 2^62 / b.
        zero_point: Of the result.
        low: The lowest result; zero_point - low < 2^(62 - c).
        high: The highest result.

    Returns:
        int64, the shape of `acc`.
    """
    b, c = multiplier.b, multiplier.c
    # With `low` inside the sum, what is negative is cut off before the shift: no sign is left.
    offset = np.asarray(bias, np.int64) * b + (1 << (c - 1)) + (np.int64(zero_point - low) << c)
    return np.minimum(np.maximum(acc * b + offset, 0) >> c, high - low) + low


def common_exponent(
    multipliers: Sequence[float], largest_shift: int = LARGEST_SHIFT
) -> tuple[list[int], int]:
    """Integers b_i and one c with b_i / 2^c nearest to the multipliers: products add unrounded.

    The largest magnitude has 31 significant bits, so a sum of 16-bit products fits int64.

    Raises:
        IntqError: As for `dyadic`.
    """
    c = min(int(dyadic(abs(m), largest_shift).c) for m in multipliers)
    return [int(np.floor(np.ldexp(m, c) + 0.5)) for m in multipliers], c


def weighted_sum(
    terms: Sequence[Any], factors: Sequence[int], c: int, *, zero_point: int, low: int, high: int
) -> Any:
    """clip(((sum of term * factor) + 2^(c-1) >> c) + zero_point, low, high): one rounding.

    Args:
        terms: int64 arrays or `trace.Value` of shapes that broadcast; two of less than 2^16 are
            safe, else the sum must fit int64.
        factors: |factor| < 2^31; real factors are factor / 2^c, see `common_exponent`.
        c: zero_point - low < 2^(62 - c).
        zero_point: Of the result.
        low: The lowest result.
        high: The highest result.

    Returns:
        int64, of the shape they broadcast to.
    """
    total: Any = (1 << (c - 1)) + ((zero_point - low) << c)
    for term, factor in zip(terms, factors, strict=True):
        total = term * factor + total
    return np.minimum(np.maximum(total, 0) >> c, high - low) + low


def _smallest_error(
    rows: Float, largest: npt.NDArray[np.float32], grid: Grid
) -> npt.NDArray[np.float32]:
    best, scales = np.full(len(rows), np.inf), largest
    # The fewer bits, the more it pays to cut off: most at 0.3 of the largest weight for 2 bits.
    lowest = 0.05 if grid.bits < 4 else 0.3
    for factor in np.linspace(1.0, lowest, round(100 * (1 - lowest)) + 1):
        tried = _float32_scales(largest * factor)
        steps = tried.astype(np.float64)[:, None]
        q = np.clip(np.rint(rows / steps), grid.low, grid.high)
        error = np.square(q * steps - rows).sum(axis=1)
        better = error < best
        best = np.where(better, error, best)
        scales = np.where(better, tried, scales)
    return scales


def _float32_scales(scales: Float) -> npt.NDArray[np.float32]:
    """As stored: the error is that of the rounded scale."""
    return np.maximum(scales.astype(np.float32), SMALLEST_SCALE)


def _scale(value: float) -> np.float32:
    return max(np.float32(value), SMALLEST_SCALE)


def _along(values: Float, rank: int, axis: int | None) -> Float:
    if values.ndim == 0 or axis is None:
        return values
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])
