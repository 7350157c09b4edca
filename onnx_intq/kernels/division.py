"""Quotients of two integer grids, rounded once.

A divisor of 0 counts as one step, so that no division fails (onnxruntime stops at an integer
division by zero): x / 0 becomes x / step, large but finite.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def divide(a: Any, a_scale: float, b: Any, b_scale: float, bits: int = 14) -> tuple[Any, float]:
    """The quotient a / b with `bits` fractional bits, rounded half up.

    Error: half a step, a_scale / b_scale / 2^(bits + 1). For b > 0 the quotient is
    floor((a 2^bits + floor(b / 2)) / b): for an odd b no quotient ends in a half, for an even one
    b / 2 is exact, so both are rounded half up. A negative b changes the sign of both.

    Bounds: |a| 2^bits + |b| / 2 < 2^62, and |result| <= |a| 2^bits. For 16-bit integers and 14 bits
    all is int32: 2^30 + 2^15. More bits are of no use, because |b| <= 2^16: a of full scale has a
    quotient of 2^13 steps or more.

    Args:
        a: int64, or a `trace.Value`.
        a_scale: Real units per step of `a`.
        b: int64, a shape that broadcasts with that of `a`; or a `trace.Value`. 0 counts as 1.
        b_scale: Real units per step of `b`.
        bits: The result has 2^bits steps per a_scale / b_scale.

    Returns:
        Integers and their scale.
    """
    divisor = np.maximum(np.abs(b), 1)
    dividend = np.where(b < 0, -a, a) << bits
    return (dividend + (divisor >> 1)) // divisor, math.ldexp(a_scale / b_scale, -bits)


def reciprocal(q: Any, scale: float, bits: int = 30) -> tuple[Any, float]:
    """1 / (q * scale) with `bits` fractional bits, rounded half up.

    30 bits leave 14 significant ones for |q| = 65535, and need 32.

    Args:
        q: int64, or a `trace.Value`. 0 counts as 1.
        scale: Real units per step.
        bits: 0..61.

    Returns:
        Integers of the shape of `q`, at most 2^bits, and their scale.
    """
    return divide(np.int64(1), 1.0, q, scale, bits)
