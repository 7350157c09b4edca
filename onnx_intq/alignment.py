"""Scales whose ratios have odd denominators: float and integer requantisation then agree exactly.

onnxruntime requantises a Q/DQ graph in float32 and rounds half to even; integers round half up.
Both can differ only next to a tie. With y_scale / (x_scale * w_scale) = d / 2^j and d odd, an
accumulator acc gives acc * 2^j / d, which is no closer to a tie than 1 / (2 d): further than
float32 errs. So the Q/DQ file and the integer-only file compute the same integers, everywhere.
A weight scale moves by at most one part in d to get there, and d is above 128.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

SMALLEST_DIVISOR = 129
"""d is at least this: no scale moves by more than half a step in 128."""
LARGEST_DIVISOR = 1 << 24
"""Above, a channel is dead, and its scale stays."""
ADDEND_DIVISOR = 1023
"""Scales of addends are multiples of 1 / 1023 of the sum's: odd, and float32 tells them apart."""


def aligned(
    scales: npt.NDArray[np.float32],
    x_scale: float,
    y_scale: float,
    floor: npt.NDArray[np.float32] | float = 0.0,
) -> npt.NDArray[np.float32]:
    """Weight scales near `scales` with y_scale / (x_scale * scale) = odd / power of two.

    Args:
        scales: float32, any shape.
        x_scale: Of the other factor.
        y_scale: Of the result.
        floor: No scale goes below; broadcasts to `scales`.

    Returns:
        float32, the shape of `scales`.
    """
    ratio = np.asarray(y_scale / (x_scale * scales.astype(np.float64)))
    doublings = np.maximum(np.ceil(np.log2(SMALLEST_DIVISOR / ratio)), 0)
    divisor = ratio * np.exp2(doublings)
    odd = 2 * np.rint((divisor - 1) / 2) + 1
    found = y_scale / (x_scale * odd / np.exp2(doublings))
    found = np.where(found < floor, y_scale / (x_scale * (odd - 2) / np.exp2(doublings)), found)
    suits = (ratio < LARGEST_DIVISOR) & (found >= floor)
    return np.where(suits, found, scales).astype(np.float32)


def addend_scale(scale: float, sum_scale: float) -> np.float32:
    """The scale of an addend raised to the next multiple of sum_scale / 1023."""
    return np.float32(math.ceil(scale / sum_scale * ADDEND_DIVISOR) * sum_scale / ADDEND_DIVISOR)
