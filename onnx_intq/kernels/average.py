"""Means in integers, rounded half up: over axes, over pooling windows, over masked frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def average(total: Any, count: Any, bits: int = 0) -> Any:
    """Averages from sums: total / count with `bits` fractional bits, rounded half up.

    floor((2 total 2^bits + count) / (2 count)).
    Error: half a step. Bounds: |total| 2^(bits+1) + count < 2^63; a total of n 16-bit integers is
    below 2^16 n, so n < 2^(45 - bits).

    Args:
        total: int64, any shape, or a `trace.Value`: sums, for example of pooling windows.
        count: How many were added: a positive int, an int64 array that broadcasts to `total` (a
            pooling window has fewer at the edges), or a `trace.Value` that is proven >= 1.
        bits: The result has 2^bits steps per step of `total`.

    Returns:
        Integers of the shape of `total`.
    """
    return ((total << (bits + 1)) + count) // (2 * count)


def mean(
    q: Any, scale: float, shape: Sequence[int], axes: Sequence[int], bits: int = 8
) -> tuple[Any, float]:
    """The mean of q * scale over `axes`, which stay with size 1.

    Bounds: as for `average`; the mean of integers in low..high is in low 2^bits .. high 2^bits.

    Args:
        q: int64, 16-bit range, or a `trace.Value`.
        scale: Real units per step.
        shape: Of `q`; only the sizes at `axes` are looked at.
        axes: At least one.
        bits: As for `average`: 8 make the rounding small beside that of an 8-bit result.

    Returns:
        Integers and their scale.
    """
    count = math.prod(shape[axis] for axis in axes)
    for axis in axes:
        q = np.sum(q, axis=axis, keepdims=True)
    return average(q, count, bits), math.ldexp(scale, -bits)
