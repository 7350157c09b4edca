"""The exponential of x <= 0 in integers, after I-BERT's i-exp (Kim et al., arXiv:2101.01321).

x = -z ln 2 + p with p in (-ln 2, 0]; exp(p) is a parabola a (p + b)^2 + c; exp(x) = exp(p) / 2^z.
I-BERT rounds b, c and ln 2 to the steps of its input, which is coarse for 8 bits. Mode "poly" first
multiplies the input up to 2^14 steps per ln 2 (a dyadic multiplier, rounded half up), so that the
constants are exact to 2^-15, and dividing by ln 2 is a shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnx_intq.trace import bounded, take
from onnx_intq.transform import IntqError

Mode = Literal["poly", "paper", "lut"]

LARGEST = 65535
"""No two integers of a 16-bit grid are farther apart."""

OCTAVE = 14
"""Mode "poly" has 2^14 steps per factor of two: the parabola then needs 31 bits."""

_STEP = math.log(2) / (1 << OCTAVE)


@dataclass(frozen=True, kw_only=True)
class Parabola:
    """exp(p) for p in (-ln 2, 0] as a (p + b)^2 + c, where c = at_zero - a b^2."""

    a: float
    b: float
    at_zero: float

    @property
    def vertex(self) -> int:
        """`b` in steps: below 2^15, because b < 2 ln 2."""
        return round(self.b / _STEP)

    @property
    def peak(self) -> int:
        """The value at 0, in units of a * step^2: a multiple of 2^17 below 2^31.

        The multiple makes 1, its half, a multiple of 2^16: quotients by a sum are then exact at 0.
        It changes the constant c by less than 2^16 / 2^30.
        """
        return round(math.ldexp(self.at_zero / (self.a * _STEP**2), -17)) << 17


MINIMAX = Parabola(a=0.357996618, b=1.349062567, at_zero=0.998761974)
"""Least largest error, 1.238e-3 (linear programming over 4,001 points; I-BERT's own: 2.1e-3)."""

ANCHORED = Parabola(a=0.361182804, b=1.342953015, at_zero=1.0)
"""Least largest relative error, 2.214e-3, of those with exp(0) = 1: for quotients of exponentials.

A sigmoid is off by 5.5e-4, as with `MINIMAX`, but sigmoid(0) = 1/2 and tanh(0) = 0 are exact.
"""

TABLED_ONE = (1 << 30) - (1 << 16)
"""1 in mode "lut": a multiple of 2^16, too."""

PUBLISHED_A, PUBLISHED_B, PUBLISHED_C = 0.3585, 1.353, 0.344
"""I-BERT, section 3.5."""


def exp(q: Any, scale: float, mode: Mode = "poly") -> tuple[Any, float]:
    """The exponential of q * scale for q <= 0; a positive q counts as 0.

    Errors, largest: "poly" 1.3e-3 at any width; "paper" 2.1e-3 and about `scale`; "lut" 2^-31.

    Args:
        q: int64, any shape, -65535 <= q; or a `trace.Value`. Mode "lut": -255 <= q.
        scale: Real units per step.
        mode: See `onnx_intq.kernels`.

    Returns:
        Integers of the shape of `q`, 0 <= e < 2^30, and their scale.

    Raises:
        IntqError: Mode "paper" and a scale above ln 2.
    """
    return decay(-q, scale, mode, MINIMAX)


def decay(
    distance: Any, scale: float, mode: Mode = "poly", parabola: Parabola = ANCHORED
) -> tuple[Any, float]:
    """The exponential of -distance * scale, from 2^29 <= e(0) < 2^30 down to 0.

    Args:
        distance: int64, any shape, 0..65535 (0..255 for "lut"); or a `trace.Value`. What is below
            0 counts as 0.
        scale: Real units per step, from 2^-60. Mode "paper" takes those below 2^-28 for 2^-28.
        mode: See `onnx_intq.kernels`.
        parabola: Of mode "poly". With `ANCHORED`, and in mode "lut", e(0) * scale_out = 1.

    Returns:
        As `exp`.

    Raises:
        IntqError: As `exp`.
    """
    if mode == "lut":
        return tabled(distance, scale, TABLED_ONE), 1 / TABLED_ONE
    if mode == "paper":
        return _published(distance, scale)
    return _in_octaves(distance, scale, parabola), 2 * parabola.at_zero / parabola.peak


def peak(scale: float, mode: Mode) -> int:
    """e(0) of `decay`: the largest it returns, in 2^29 .. 2^30 - 1."""
    return int(decay(np.zeros((), np.int64), scale, mode)[0])


def tabled(distance: Any, scale: float, at_zero: int) -> Any:
    """at_zero * exp(-distance * scale), rounded, from a table of 256 entries or fewer.

    Args:
        distance: As for `decay`. 256 and more only where the table has come down to 0.
        scale: Real units per step.
        at_zero: The value at 0, below 2^53.

    Returns:
        Integers of the shape of `distance`, 0..at_zero.
    """
    table = np.rint(at_zero * np.exp(-scale * np.arange(256))).astype(np.int64)
    last = int(np.count_nonzero(table))  # the entries fall: those after the first 0 are 0
    return take(table[: last + 1], np.clip(distance, 0, last if last < 256 else LARGEST))


def _in_octaves(distance: Any, scale: float, parabola: Parabola) -> Any:
    """Mode "poly".

    Bounds, all int32: distance * multiplier + half < 2^31 (`_to_octaves`). 0 <= part < 2^14 and
    2^14 < vertex < 2^15, so 0 < u < 2^15 and u^2 + c falls from peak < 2^31 as part grows.
    From z = 30 on the divisor is 2^31 - 1 > peak: the quotient is 0.
    """
    multiplier, shift, limit = _to_octaves(scale)
    half = 1 << (shift - 1)
    t = (np.clip(distance, 0, limit) * multiplier + half) >> shift
    z = t >> OCTAVE
    part = bounded(t - (z << OCTAVE), 0, (1 << OCTAVE) - 1)  # what the floor left
    u = parabola.vertex - part
    last = (limit * multiplier + half) >> (shift + OCTAVE)
    powers = 1 << np.minimum(np.arange(last + 1) + 1, 31)
    halvings = take(np.minimum(powers, (1 << 31) - 1), z)
    return (u * u + (parabola.peak - parabola.vertex**2)) // halvings


def _to_octaves(scale: float) -> tuple[int, int, int]:
    """Multiplier, shift and limit: distance -> 2^-14 octaves is (distance * m + 2^(s-1)) >> s.

    Distances from 30 octaves on give 0, so they are cut off at the limit, the first such one. With
    r = 2^14 octaves per step and limit * r * 2^s <= 2.1e9 by choice of s <= 26:
    limit * m + 2^(s-1) <= 2.1e9 + limit / 2 + 2^25 < 2.1e9 + 2^15 + 2^25 < 2^31.
    With s < 26, limit * m > 1.05e9 - limit / 2: so m is off by 3.2e-5 of itself at most, and exp by
    3.2e-5 |x| exp(x). With s = 26, distance * m / 2^s is off by 65535 / 2^27 of a step at most.
    """
    rate = min(scale, 64.0) / _STEP  # one step of 64 is beyond 30 octaves
    limit = min(math.ceil((30 << OCTAVE) / rate), LARGEST)
    shift = min(26, math.floor(math.log2(2.1e9 / (limit * rate))))
    return round(math.ldexp(rate, shift)), shift, limit


def _published(distance: Any, scale: float) -> tuple[Any, float]:
    """Mode "paper": constants and ln 2 are floored to steps of the input.

    Bounds: 2^-28 <= scale <= ln 2, so b, c and ln2 are >= 1 and b^2 + c < 2^59. The parabola is
    largest at 0, where it has `width` bits, hence 0 after so many halvings; the last shift brings
    it to 30 bits.
    """
    if scale > math.log(2):
        raise IntqError(
            f"an exponential of steps of {scale:.3g}; expected at most ln 2 = 0.693 in mode paper; "
            "use mode poly, or 16 bits for its input"
        )
    scale = max(scale, 2.0**-28)
    ln2, b = math.floor(math.log(2) / scale), math.floor(PUBLISHED_B / scale)
    c = math.floor(PUBLISHED_C / (PUBLISHED_A * scale**2))
    width = (b * b + c).bit_length()
    distance = np.clip(distance, 0, LARGEST)
    z = distance // ln2
    u = bounded(z * ln2 - distance, 1 - ln2, 0) + b  # minus what the floor left
    halvings = take(1 << np.arange(width + 1), np.minimum(z, width))
    up = 30 - width
    e = (u * u + c) // halvings
    return (e << up if up >= 0 else e >> -up), PUBLISHED_A * scale**2 / 2.0**up
