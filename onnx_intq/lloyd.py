"""Fits a few centroids, shared by all channels, and a scale per channel to a weight.

Lloyd's algorithm (1982) in one dimension, on weights in steps of their channel's scale, takes turns
with the least-squares scales. It starts from the best of some mu-law grids and the uniform one,
whose scales leave each channel the room its largest weights need: divided by their standard
deviation they lose it, which costs a real network far more than Gaussian weights let expect.
Law: the weighted squared error is at most that of the uniform grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_intq.grid import SMALLEST_SCALE, quantize, weight_grid, weight_scales

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

TOP = 127
"""Centroids lie in -TOP .. TOP."""
BINS = 16 * 2 * TOP
"""Of the histogram that centroids are fitted to."""
ROUNDS, STEPS = 3, 10
"""Turns of scales and centroids; moves of the centroids in each."""
MUS = (1.0, 4.0, 16.0, 64.0)
"""Curvatures of mu-law grids that are tried."""
SAMPLE = 1 << 16
"""Weights that are enough to compare curves by."""
CLIPS = (1.0, 0.8, 0.6, 0.45)
"""Largest centroids that are tried, by the channel's largest weight."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Weights as integers with scales.

    Attributes:
        stored: int8 [channels, values].
        scales: float32 [channels].
    """

    stored: npt.NDArray[np.int8]
    scales: Float32


def fit(rows: Float32, factors: Float32, bits: int) -> Fit:
    """Place centroids where the error is least.

    Args:
        rows: Weights, [channels, values].
        factors: Of their squared errors, the same shape.
        bits: 1..7.
    """
    start = min(
        (_uniform(rows, factors, bits), fit_mu_law(rows, factors, bits)),
        key=lambda one: _error(one, rows, factors),
    )
    levels, scales = _start(start, bits)
    for _ in range(ROUNDS):
        levels = _moved(levels, rows / scales[:, None], factors * np.square(scales)[:, None])
        scales = _refit(levels, scales, rows, factors)
    found = _rounded(levels, scales, rows, factors)
    return min((start, found), key=lambda one: _error(one, rows, factors))


def fit_mu_law(rows: Float32, factors: Float32, bits: int) -> Fit:
    """Place centroids evenly along a mu-law curve: the nearer to 0, the denser.

    Args:
        rows: Weights, [channels, values].
        factors: Of their squared errors, the same shape.
        bits: 1..7.
    """
    largest = np.maximum(np.abs(rows).max(axis=1), SMALLEST_SCALE) / TOP
    some = _sample(rows.shape)
    tried = [(mu, clip) for mu in MUS for clip in CLIPS]
    mu, clip = min(
        tried,
        key=lambda one: _error(
            _on_curve(bits, one[0], one[1], largest[some[0]], rows[some], factors[some]),
            rows[some],
            factors[some],
        ),
    )
    return _on_curve(bits, mu, clip, largest, rows, factors)


def _on_curve(
    bits: int, mu: float, clip: float, largest: Float32, rows: Float32, factors: Float32
) -> Fit:
    """The fit to one mu-law curve that begins with a part of the largest scales."""
    levels, scales = mu_law(bits, mu), np.asarray(largest * clip, np.float32)
    for _ in range(2):
        scales = _refit(levels, scales, rows, factors)
    return _rounded(levels, scales, rows, factors)


def _sample(shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows, or columns where there are too few of them, by which curves are compared."""
    step = -(-shape[0] * shape[1] // SAMPLE)
    every = slice(None, None, step)
    return (every, slice(None)) if shape[0] >= step else (slice(None), every)


def mu_law(bits: int, mu: float) -> Float32:
    """2^bits levels in -TOP .. TOP, evenly spaced after y = sgn(x) ln(1 + mu |x|) / ln(1 + mu)."""
    even = np.linspace(-1, 1, 1 << bits)
    curved = np.sign(even) * np.expm1(np.abs(even) * np.log1p(mu)) / mu
    return np.asarray(curved * TOP, np.float32)


def nearest(levels: npt.NDArray[np.generic], values: Float32) -> npt.NDArray[np.intp]:
    """The index of the level nearest to each value; levels ascend."""
    middles = (levels[1:].astype(np.float32) + levels[:-1].astype(np.float32)) / 2
    found: npt.NDArray[np.intp] = np.searchsorted(middles, values)
    return found


def _uniform(rows: Float32, factors: Float32, bits: int) -> Fit:
    """The grid of as many bits; of one bit, plus and minus the mean magnitude."""
    if bits == 1:
        total = np.maximum(factors.sum(axis=1), np.finfo(np.float32).tiny)
        mean = (np.abs(rows) * factors).sum(axis=1) / total
        scales = np.maximum(mean.astype(np.float32), SMALLEST_SCALE)
        return Fit(np.where(rows < 0, -1, 1).astype(np.int8), scales)
    scales = weight_scales(rows, 0, bits)
    return Fit(quantize(rows, scales, 0, weight_grid(bits), 0).astype(np.int8), scales)


def _start(start: Fit, bits: int) -> tuple[Float32, Float32]:
    """The levels of a fit stretched to reach TOP, with one more where there may be, and scales."""
    levels = np.unique(start.stored).astype(np.float32)
    stretch = np.float32(TOP / max(np.abs(levels).max(), 1))
    levels = levels * stretch
    if len(levels) == (1 << bits) - 1:  # the uniform grid: symmetric, so one level short
        levels = np.sort(np.append(levels, np.float32(stretch / 2)))
    return levels, start.scales / stretch


def _moved(levels: Float32, values: Float32, factors: Float32) -> Float32:
    """Move every level to the mean of the values nearest to it, again and again."""
    bins = np.clip((values + TOP) * (BINS / (2 * TOP)), 0, BINS - 1).astype(np.int32).ravel()
    weights = np.bincount(bins, factors.ravel(), BINS)
    clipped = np.clip(values, -TOP, TOP)
    sums = np.bincount(bins, (factors * clipped).ravel(), BINS)
    middles = (np.arange(BINS) + 0.5) * (2 * TOP / BINS) - TOP
    for _ in range(STEPS):
        own = nearest(levels, middles.astype(np.float32))
        total = np.bincount(own, weights, len(levels))
        means = np.bincount(own, sums, len(levels)) / np.maximum(total, np.finfo(np.float64).tiny)
        levels = np.sort(np.where(total > 0, means, levels)).astype(np.float32)
    return levels


def _refit(levels: Float32, scales: Float32, rows: Float32, factors: Float32) -> Float32:
    """The scales of least squared error, each weight staying at its level."""
    chosen = levels[nearest(levels, rows / scales[:, None])]
    over = (factors * rows * chosen).sum(axis=1, dtype=np.float64)
    under = (factors * chosen * chosen).sum(axis=1, dtype=np.float64)
    found = np.where(over > 0, over / np.maximum(under, np.finfo(np.float64).tiny), scales)
    return np.maximum(found, SMALLEST_SCALE).astype(np.float32)


def _rounded(levels: Float32, scales: Float32, rows: Float32, factors: Float32) -> Fit:
    """The levels rounded to integers, and the scales that fit these."""
    integers = np.unique(np.rint(np.clip(levels, -TOP, TOP))).astype(np.float32)
    scales = _refit(integers, scales, rows, factors)
    stored = integers[nearest(integers, rows / scales[:, None])]
    return Fit(stored.astype(np.int8), scales)


def _error(found: Fit, rows: Float32, factors: Float32) -> float:
    lost = found.stored * found.scales[:, None] - rows
    return float((factors * np.square(lost)).sum(dtype=np.float64))
