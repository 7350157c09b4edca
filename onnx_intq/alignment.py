"""Scales whose ratios have odd denominators: float and integer requantisation then agree exactly.

onnxruntime requantises a Q/DQ graph in float32 and rounds half to even; integers round half up.
Both can differ only next to a tie. With y_scale / (x_scale * w_scale) = d / 2^j and d odd, an
accumulator acc gives acc * 2^j / d, which is no closer to a tie than 1 / (2 d). float32 rounds four
times: the weight scale, the product and the quotient of the scales, the product with acc. On 8-bit
results that is at most 254.5 * 4 * 2^-24, which is less than 1 / (2 d) for d up to 2^13. So the
Q/DQ file and the integer-only file compute the same integers; above 2^13 (tiny weights) a few
results in a million may differ, by 1.
A weight scale moves by at most one part in d to get there, two if only upwards; d is above 128.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

SMALLEST_DIVISOR = 129
"""d is at least this: no scale moves by more than one part in 128, or 64 if only upwards."""
LARGEST_DIVISOR = 1 << 24
"""Above, a channel is dead, and its scale stays."""
ADDEND_DIVISOR = 1023
"""Scales of addends are multiples of 1 / 1023 of the sum's: odd, and float32 tells them apart."""
SMALLEST_MULTIPLE = 16
"""An addend of fewer 1023rds keeps its scale, which would be raised by more than a 16th."""


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
        floor: No scale goes below; none is. Broadcasts to `scales`.

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
    """The scale of an addend, raised to a multiple of sum_scale / 1023 if that is near."""
    multiple = scale / sum_scale * ADDEND_DIVISOR
    if multiple < SMALLEST_MULTIPLE:
        return np.float32(scale)
    return np.float32(math.ceil(multiple) * sum_scale / ADDEND_DIVISOR)
