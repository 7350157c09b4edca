"""Softmax, attention's softmax(q) @ v with delayed normalisation, and log-softmax, in integers.

All start from e = exp(q - row maximum), which `onnx_intq.kernels.exponential` gives with
e(0) = peak in 2^29 .. 2^30 - 1. A row's maximum contributes exactly `peak` to the row's sum, so

    peak <= sum <= 2^16 * peak < 2^46        (rows of up to 2^16 elements)

and no divisor made of it is 0. `axis` is counted from the end.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from onnx_intq.grid import dyadic
from onnx_intq.kernels.exponential import LARGEST, Mode, decay, peak, tabled
from onnx_intq.trace import bounded, take
from onnx_intq.transform import IntqError

LARGEST_INT32 = (1 << 31) - 1

LOGARITHM = (0.997247873, -0.469800384, 0.222625534, -0.056925843)
"""ln(1 + u) = c1 u + c2 u^2 + c3 u^3 + c4 u^4, u in [0, 1], exact at both ends.

The least largest error of those, 7.84e-5, by linear programming over 4,001 points. A cubic is off
by 6.1e-4, a parabola by 5.3e-3, more than the exponential. It is computed once a row: cheap.
"""

LOGARITHM_BITS = 24
"""Logarithms are computed in steps of 2^-24."""


def softmax(
    q: Any, scale: float, axis: int = -1, mode: Mode = "poly", bits: int = 15
) -> tuple[Any, float]:
    """Probabilities exp(x) / sum(exp(x)) along `axis`, x = q * scale.

    Errors, largest: "poly" 1.2e-3 (p (1 - p) times the spread of exp's relative errors, 4.4e-3),
    "lut" 2^(bits-30) p and half a step; against the true softmax of q * scale.

    Bounds: the divisor is the rounded sum / 2^bits. It is at least peak >> bits >= 2^13, and off by
    2^(bits-30) of itself at most. A divisor above 2^31 - 1 > 2 * peak would give 0, as 2^31 - 1
    does, so it is cut there, and e + divisor / 2 < 2^30 + 2^30: the elementwise part is int32.

    Args:
        q: int64, any shape, rows of up to 2^16 integers at most 65535 apart (255: "lut"); or a
            `trace.Value`.
        scale: Real units per step.
        axis: Along which the results add up to 1, nearly.
        mode: See `onnx_intq.kernels`.
        bits: The result has scale 2^-bits, 1 <= bits <= 16.

    Returns:
        Integers of the shape of `q`, 0..2^bits (+ 2^(bits-13) in mode "paper"), and their scale.

    Raises:
        IntqError: Mode "paper" and a scale above ln 2.
    """
    e, _ = decay(_distance(q, axis), scale, mode)
    total = np.sum(e, axis=axis, keepdims=True) + (1 << (bits - 1))
    divisor = np.clip(total >> bits, peak(scale, mode) >> bits, LARGEST_INT32)
    return (e + (divisor >> 1)) // divisor, 2.0**-bits


def softmax_matmul(
    q: Any,
    scale: float,
    v: Any,
    multiplier: float,
    *,
    v_zero_point: int = 0,
    v_bits: int = 8,
    zero_point: int,
    low: int,
    high: int,
    mode: Mode = "poly",
) -> Any:
    """Attention: softmax(q) @ (v - v_zero_point) on an integer grid, normalised after the product.

    The exponentials are kept in 8 bits with 255 for the row's maximum, which keeps small
    probabilities that 8 bits of the normalised softmax would lose. One division normalises and
    requantises, exactly rounded (half up) but for that of the multiplier:

        y = clip(floor(r * sum(w (v - v_zero_point)) / sum(w) + 1/2) + zero_point, low, high)

    Bounds: 255 <= total <= 255 * 2^16 < 2^24, because the maximum's weight is 255; so no division
    by 0. |w @ v| <= 255 * 255 * 2^16 < 2^32. With K fractional bits, b = r * 2^K <= 2^29, and
    K <= 37 - bits of (zero_point - low): |offset| <= 2^37 + 2^36 + 2^8 b <= 2.5 * 2^37, hence
    |w @ v * b + total * offset| < 2^61 + 2.5 * 2^61 < 2^63. Divisor: total * 2^K < 2^61.
    With v of 16 bits, |w @ v| < 2^39 + 2^33 and b <= 2^21: nothing else changes.

    Args:
        q: int64 [..., T], 8- or 16-bit, T <= 2^16; or a `trace.Value`.
        scale: Real units per step of `q`.
        v: int64 [..., T, D], |v| <= 255. For a fast product as ONNX nodes: -128..127. Of 16 bits:
            -32896..32639, which is 256 * high + low of two int8.
        multiplier: r = scale of `v` / scale of the result, 0 <= r <= 2^16.
        v_zero_point: Of `v`; within the same limits.
        v_bits: Of `v`, 8 or 16.
        zero_point: Of the result, low <= zero_point <= high.
        low: The lowest integer of the result's grid, 8 or 16 bits.
        high: The highest.
        mode: See `onnx_intq.kernels`.

    Returns:
        Integers [..., D] in low..high.

    Raises:
        IntqError: A multiplier out of range; as `softmax`.
    """
    most = 37 - (zero_point - low).bit_length()
    b, fraction = _fixed_point(multiplier, most, 29 if v_bits == 8 else 21)
    weights = _weights(_distance(q, -1), scale, mode)
    total = np.maximum(np.sum(weights, axis=-1, keepdims=True), 255)
    offset = ((zero_point - low) << fraction) + (1 << (fraction - 1)) - v_zero_point * b
    # With `low` inside, what is negative is cut off before the division: no sign is left.
    dividend = np.maximum(np.matmul(weights, v) * b + total * offset, 0)
    return np.minimum(dividend // (total << fraction), high - low) + low


def log_softmax(q: Any, scale: float, axis: int = -1, mode: Mode = "poly") -> tuple[Any, float]:
    """Logarithms x - maximum - ln(sum(exp(x - maximum))) along `axis`, x = q * scale.

    Law: no result is above 0, and it is 0 where one element has all the probability.
    Errors, largest: "poly" 2.4e-3 (the relative error of exp and that of the logarithm), "lut"
    1e-4, and half a step of the result.

    Bounds: sum * 2^16 < 2^62; the ratio of sum and peak in 2^16 .. 2^32; the rest is with `_log`
    and `_finer`. The result is above -(2^30 + 11.1 * 2^24) > -2^31: int32.

    Args:
        q: As for `softmax`.
        scale: Real units per step.
        axis: Negative.
        mode: See `onnx_intq.kernels`.

    Returns:
        Integers of the shape of `q`, <= 0, and their scale: 2^-14 or finer for scales up to 1,
        `scale` / 2^14 above.

    Raises:
        IntqError: As `softmax`.
        ValueError: An axis that is not counted from the end.
    """
    if axis >= 0:
        raise ValueError(f"axis {axis}; expected one counted from the end, below 0")
    distance = _distance(q, axis)
    e, _ = decay(distance, scale, mode)
    total = np.sum(e, axis=axis, keepdims=True)
    # No ratio is cut (see the module's text), but so the graph alone bounds all that follows.
    ratio = np.clip((total << 16) // peak(scale, mode), 1 << 16, 1 << 32)
    finer = _finer(scale)
    step = math.ldexp(scale, -finer)
    to_steps = dyadic(2.0**-LOGARITHM_BITS / step)
    b, c = int(to_steps.b), int(to_steps.c)
    normaliser = (_log(ratio, axis) * b + (1 << (c - 1))) >> c
    below = distance << finer if finer >= 0 else distance >> -finer
    return -normaliser - below, step


def _distance(q: Any, axis: int) -> Any:
    """How far below the row's maximum; >= 0, because no element is above the maximum."""
    return bounded(np.max(q, axis=axis, keepdims=True) - q, 0, LARGEST)


def _weights(distance: Any, scale: float, mode: Mode) -> Any:
    """255 exp(-distance * scale), rounded to 0..255: peak / step is 255 to 2^-20."""
    if mode == "lut":
        return tabled(distance, scale, 255)
    step = round(peak(scale, mode) / 255)
    return (decay(distance, scale, mode)[0] + step // 2) // step


def _fixed_point(multiplier: float, most: int, bits: int) -> tuple[int, int]:
    """(b, K) with b / 2^K nearest to the multiplier, b <= 2^bits, bits - 17 <= K <= `most`.

    With 29 bits, the product with |v| <= 255 is off by 255 / 2^(K+1): 1/32 of a step at most, and
    1e-4 where the multiplier is up to 2^8. With 21 bits and |v| <= 65535: 1/64 where it is up to 1.
    """
    if not 0 <= multiplier <= 1 << 16:
        raise IntqError(
            f"an attention output by {multiplier:g}; expected a ratio of scales from 0 to 65536; "
            "calibrate again: the scales of v and of the output are too far apart"
        )
    fraction = min(most, bits - math.frexp(multiplier)[1])
    return round(multiplier * 2**fraction), fraction


def _finer(scale: float) -> int:
    """By how many binary digits the steps of a log-softmax are finer than `scale`.

    Steps of 2^-14 or less, but 2^-24 or more, so that ln(2^16) < 11.1 has at most 11.1 * 2^24
    steps; at most 14 digits, so that 65535 steps become less than 2^30.
    """
    exponent = math.log2(scale)
    if exponent < -LOGARITHM_BITS:
        return LOGARITHM_BITS + math.floor(exponent)
    return min(14, max(0, 14 + math.ceil(exponent)))


def _log(ratio: Any, axis: int) -> Any:
    """ln(ratio / 2^16) in steps of 2^-24, size 1 along `axis`; ratio in 2^16 .. 2^32.

    The octave is how many of 2^17 .. 2^32 the ratio reaches; divided by 2^octave, the ratio is in
    [2^16, 2^17). Coefficients below 2^24 times u < 2^16 fit int64 by far. Error: that of the
    polynomial, and 2^-16 of the floor.
    """
    thresholds = (1 << np.arange(17, 33)).reshape(16, *(1,) * (-axis - 1))
    reached = np.where(ratio >= thresholds, 1, 0)
    octave = bounded(np.sum(reached, axis=axis, keepdims=True), 0, 16)
    mantissa = ratio // take(1 << np.arange(17), octave)
    u = bounded(mantissa, 1 << 16, (1 << 17) - 1) - (1 << 16)
    value = 0
    for coefficient in reversed(LOGARITHM):
        value = ((value + round(math.ldexp(coefficient, LOGARITHM_BITS))) * u) >> 16
    octaves = np.rint(np.arange(17) * math.ldexp(math.log(2), LOGARITHM_BITS)).astype(np.int64)
    return value + take(octaves, octave)
