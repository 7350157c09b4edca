"""The normalisation of LayerNorm in integers: (x - mean) / sqrt(variance + epsilon) over an axis.

With S = scale, n = length and sums over the last axis, everything up to the square root is exact:

    d = n q - sum(q)                    n times the deviation from the mean
    V = n sum(q^2) - sum(q)^2           n^2 times the variance, and V = sum(d^2) / n
    y = d / sqrt(V + epsilon n^2 / S^2)

I-BERT (arXiv:2101.01321, section 3.6) rounds the mean to a step and the root down, and has no
epsilon: that is mode "paper". Gamma and beta are left to the requantisation of the result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from onnx_intq.kernels.exponential import Mode
from onnx_intq.kernels.square_root import bit_pairs, isqrt, root
from onnx_intq.trace import bounded, take
from onnx_intq.transform import IntqError

LONGEST = 1 << 15
"""Of the normalised axis: n^2 2^32 < 2^63."""

RESULT_BITS = 24
"""The largest real result, sqrt(n), has up to this many bits."""

_UP = np.int64(1) << np.maximum(31 - np.arange(32), 0)
"""By `bit_pairs`: what brings a square root to 2^30 .. 2^31 - 1."""


def normalize(
    q: Any, scale: float, length: int, epsilon: float = 0.0, mode: Mode = "poly"
) -> tuple[Any, float]:
    """Deviations from the mean over the last axis, divided by the standard deviation.

    Error in mode "poly": one unit in `isqrt`'s result (2^-20 of y for data that fill 8 bits or
    more) and half a step of the result. A constant row gives 0.

    Args:
        q: int64 [..., length] in a 16-bit range: |q| <= 65535, and no two integers are more than
            65535 apart; or a `trace.Value` of known shape.
        scale: Real units per step.
        length: Of the last axis, 1..32768.
        epsilon: Added to the variance, in squared real units; mode "paper" has none.
        mode: "paper", or "poly"; "lut" is as "poly".

    Returns:
        Integers of the shape of `q`, |y| <= 2^25 (2^30: "paper"), and their scale.

    Raises:
        IntqError: The axis is empty or too long.
    """
    if not 1 <= length <= LONGEST:
        raise IntqError(
            f"LayerNorm over {length} elements; expected 1 to {LONGEST}; keep the node float"
        )
    if mode == "paper":
        return _published(q, length)
    return _exact(q, length, epsilon / scale**2)


def _exact(q: Any, length: int, epsilon: float) -> tuple[Any, float]:
    """Mode "poly"; `epsilon` in squared steps.

    Bounds. V = sum(d^2) / n <= n^2 65535^2 / 4 < n^2 2^30 (Popoviciu), and v = 4^e V + E is below
    2^61 + 2^61 (`_headroom`) and at least 1, as `isqrt` asks. Its root s is below 2^pairs, so with
    s' = s 2^(31 - pairs) in [2^30, 2^31) the factor 2^(61 - x) / s' is at most 2^(31 - x). As
    d' = d 2^(31 - pairs) is below 2^(30 + x), |d' factor| <= 2^61.
    """
    e, largest = _headroom(length, epsilon)
    total = np.sum(q, axis=-1, keepdims=True)
    spread = length * np.sum(q * q, axis=-1, keepdims=True) - total * total
    spread = bounded(spread, 0, length**2 << 30)
    spread = spread << 2 * e if e >= 0 else spread >> min(-2 * e, 62)
    # At least 1, for constant rows; on others it changes no root by more than its floor does.
    v = spread + max(round(math.ldexp(epsilon * length**2, 2 * e)), 1)
    pairs = bit_pairs(v)
    up = take(_UP, pairs)
    divisor = bounded(root(v, pairs) * up, 1 << 30, (1 << 31) - 1)
    x = max(0, largest.bit_length() - 30)
    factor = (1 << (61 - x)) // divisor
    deviation = bounded(q * (up * length) - total * up, -largest, largest)
    fraction = RESULT_BITS - (length.bit_length() + 1) // 2
    # Beyond 61, where epsilon dwarfs the variance, the result is less than a step anyway.
    shift = min(61 - x - e - fraction, 61)
    return (deviation * factor + (1 << (shift - 1))) >> shift, 2.0**-fraction


def _headroom(length: int, epsilon: float) -> tuple[int, int]:
    """(e, a bound of |d'|), with the largest e for 4^e n^2 2^30 <= 2^61, 4^e n^2 epsilon <= 2^61.

    d^2 <= (n - 1) sum(d^2) / n = (n - 1) V, so |d| 2^e <= sqrt(n - 1) (s + 1), and
    |d'| <= sqrt(n) 2^31 / 2^e because s + 1 <= 2^pairs. Where epsilon sets e, E > 2^58: so
    pairs >= 30, and |d'| <= 2 n 65535.
    """
    room = (31 - 2 * (length - 1).bit_length()) // 2
    if epsilon * length**2 <= 2.0 ** (61 - 2 * room):
        return room, ((math.isqrt(length - 1) + 1) << 31) >> room
    return math.floor((61 - math.log2(epsilon * length**2)) / 2), length << 17


def _published(q: Any, length: int) -> tuple[Any, float]:
    """Mode "paper".

    Bounds: |d| <= 65535, sum(d^2) < 2^(32 + 15), factor <= 2^31. As d^2 <= v < (s + 1)^2, both
    integers, |d| <= s, so |d * factor| <= 2^31.
    """
    total = np.sum(q, axis=-1, keepdims=True)
    deviation = q - (2 * total + length) // (2 * length)
    factor = (1 << 31) // isqrt(np.sum(deviation * deviation, axis=-1, keepdims=True))
    return bounded(deviation * factor, -(1 << 31), 1 << 31) >> 1, math.sqrt(length) / 2.0**30
