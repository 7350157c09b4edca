"""From a tensor's histogram to the range it is quantized in: four methods, one summary.

Every range holds zero and is wide enough for a normal float32 scale.
"""

from __future__ import annotations

import numpy as np

from onnx_intq.grid import SMALLEST_SCALE, Grid
from onnx_intq.observe import Density, Float64, Histogram
from onnx_intq.transform import IntqError, Range

OBSERVERS = ("minmax", "percentile", "entropy", "mse")
"""How the ends of a range are found."""
DEAD_RANGE = (0.0, 2.0**-10)
"""The range of a tensor that is always zero: its scale leaves room for int32 biases."""
LINEAR_BINS = 2048
"""Bins of the linear histogram that the entropy method compares, as in TensorRT."""
COARSE = 2.0 ** (-np.arange(41) / 4)
"""Factors of the first search for the least error: ten octaves."""
FINE = 2.0 ** (np.arange(-8, 9) / 32)
"""Factors of the second search, around what the first found."""


def clipping_range(
    histogram: Histogram, observer: str, grid: Grid, *, percentile: float = 99.99
) -> Range:
    """The range in which a tensor is quantized; values outside are clipped.

    Args:
        histogram: What was seen of the tensor, at least one value.
        observer: "minmax": the smallest and largest value. "percentile": the middle `percentile`
            percent of all values. "entropy": the least Kullback-Leibler divergence (TensorRT).
            "mse": the least squared error.
        grid: What the tensor will be rounded to: a signed grid has zero point 0, an unsigned one
            has a zero point that follows from the range. Matters to "entropy" and "mse".
        percentile: Percent of all values that stay inside, for "percentile".

    Raises:
        IntqError: There is no such observer.
    """
    if observer not in OBSERVERS:
        raise IntqError(f"unknown observer {observer!r}; expected one of: {', '.join(OBSERVERS)}")
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if _is_dead(low, high):
        return DEAD_RANGE
    if observer == "percentile":
        low, high = _percentile(histogram, percentile)
    elif observer == "entropy":
        low, high = _least_divergence(histogram.density(), low, high, grid)
    elif observer == "mse":
        low, high = _least_error(histogram.density(), low, high, grid)
    return DEAD_RANGE if _is_dead(low, high) else (low + 0.0, high + 0.0)


def mean_squared_error(histogram: Histogram, low: float, high: float, grid: Grid) -> float:
    """The error that quantization to `grid` over [low, high] is expected to make.

    Values count as spread evenly within their histogram bin; the integral over each is exact.
    """
    errors = _squared_errors(histogram.density(), np.array([low]), np.array([high]), grid)
    return float(errors[0]) / histogram.count


def _is_dead(low: float, high: float) -> bool:
    return high - low < 256 * float(SMALLEST_SCALE)


def _percentile(histogram: Histogram, percentile: float) -> Range:
    """The outer edges of the bins that hold the two quantiles: never cuts off more than asked."""
    edges, counts = histogram.ascending()
    below = np.cumsum(counts)
    last, tail = int(below[-1]) - 1, (1 - percentile / 100) / 2
    first_bin = np.searchsorted(below, np.floor(tail * last), side="right")
    last_bin = np.searchsorted(below, np.ceil((1 - tail) * last), side="right")
    low, high = max(edges[first_bin], histogram.low), min(edges[last_bin + 1], histogram.high)
    return min(float(low), 0.0), max(float(high), 0.0)


def _least_error(density: Density, low: float, high: float, grid: Grid) -> Range:
    """Shrink the range, one end after the other, as long as the squared error falls.

    A signed grid is centred on zero, so both ends shrink together.
    """
    floor, ceiling = low, high
    ends = [_both] if grid.signed else [_upper, _lower]
    for factors in (COARSE, FINE):
        for candidates in ends:
            lows, highs = candidates(low, high, factors)
            lows, highs = np.maximum(lows, floor), np.minimum(highs, ceiling)
            best = np.argmin(_squared_errors(density, lows, highs, grid))
            low, high = float(lows[best]), float(highs[best])
    return low, high


def _both(low: float, high: float, factors: Float64) -> tuple[Float64, Float64]:
    reach = max(-low, high) * factors
    return -reach, reach


def _upper(low: float, high: float, factors: Float64) -> tuple[Float64, Float64]:
    return np.full(factors.size, low), high * factors


def _lower(low: float, high: float, factors: Float64) -> tuple[Float64, Float64]:
    return low * factors, np.full(factors.size, high)


def _squared_errors(density: Density, lows: Float64, highs: Float64, grid: Grid) -> Float64:
    """Sum of squared errors for each range [lows[i], highs[i]], float64 [ranges].

    The error's antiderivative is known: periodic within the grid, a cube outside.
    """
    scale, first, last = _grid_ends(lows, highs, grid)
    weights = density.counts / (density.upper - density.lower)
    edges, places = np.unique([density.lower, density.upper], return_inverse=True)
    jumps = np.bincount(places.reshape(-1), np.concatenate([-weights, weights]))
    x = edges / scale[:, None]
    inside = np.clip(x, first[:, None], last[:, None])
    steps = np.rint(inside)
    x -= inside
    inside -= steps
    steps /= 12
    steps += (inside * inside * inside + x * x * x) / 3
    errors: Float64 = (steps @ jumps) * scale**3
    return errors


def _grid_ends(lows: Float64, highs: Float64, grid: Grid) -> tuple[Float64, Float64, Float64]:
    """Scale, and the grid's ends counted in steps from real zero; as in `grid`, but vectorised."""
    if grid.signed:
        scale = np.maximum(np.maximum(-lows, highs) / grid.high, SMALLEST_SCALE)
        return scale, np.full(lows.size, float(grid.low)), np.full(lows.size, float(grid.high))
    scale = np.maximum((highs - lows) / grid.high, SMALLEST_SCALE)
    zero_point = np.clip(np.rint(-lows / scale), 0, grid.high)
    return scale, -zero_point, grid.high - zero_point


def _least_divergence(density: Density, low: float, high: float, grid: Grid) -> Range:
    """Clip magnitudes where the coarse distribution best keeps the fine one's information.

    S. Migacz, 8-bit inference with TensorRT, GTC 2017. Unlike there, the merged distribution is
    that of the kept values alone, and zeros do not count.
    """
    reach = max(-low, high)
    one_sided = not grid.signed and (low == 0 or high == 0)
    levels = grid.high + 1 if one_sided or grid.signed else (grid.high + 1) // 2
    edges = np.linspace(0.0, reach, LINEAR_BINS + 1)
    below = _count_below(density, edges)
    if levels >= LINEAR_BINS:
        return low, high
    kept = np.arange(LINEAR_BINS, levels - 1, -8)
    threshold = float(edges[kept[np.argmin(_divergences(below, kept, levels))]])
    return max(low, -threshold), min(high, threshold)


def _count_below(density: Density, edges: Float64) -> Float64:
    """How many values have a magnitude below each of `edges`, interpolated within bins."""
    total = np.zeros(edges.size)
    for lower, upper, counts in (
        (density.lower, density.upper, density.counts),
        (-density.upper[::-1], -density.lower[::-1], density.counts[::-1]),
    ):
        side = lower >= 0
        if side.any():
            points = np.stack([lower[side], upper[side]], axis=1).reshape(-1)
            ends = np.cumsum(counts[side])
            values = np.stack([ends - counts[side], ends], axis=1).reshape(-1)
            total += np.interp(edges, points, values)
    return total


def _divergences(below: Float64, kept: np.ndarray, levels: int) -> Float64:
    """KL(P || Q) for keeping the first `kept[i]` bins: Q is P merged to `levels` levels.

    Clipped values count in P's last bin; Q spreads each level over the bins that are not empty.
    All sums over bins follow from cumulative ones at the levels' edges.
    """
    fine = np.diff(below)
    clipped = below[-1] - below[kept]
    entropy = np.concatenate([[0.0], np.cumsum(_xlogy(fine, fine))])
    end = fine[kept - 1] + clipped
    own = entropy[kept - 1] + _xlogy(end, end)
    ends = np.rint(np.arange(levels + 1) * kept[:, None] / levels).astype(np.intp)
    mass = np.diff(below[ends], axis=1)
    filled = np.diff(np.concatenate([[0], np.cumsum(fine > 0)])[ends], axis=1)
    filled[:, -1] += (fine[kept - 1] == 0) & (clipped > 0)
    full = mass.copy()
    full[:, -1] += clipped
    merged = _xlogy(full, mass / np.maximum(filled, 1)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = (own - merged) / below[-1] - np.log(below[-1] / below[kept])
    return np.where(below[kept] > 0, divergence, np.inf)


def _xlogy(x: Float64, y: Float64) -> Float64:
    """X log y, 0 where x is 0 and minus infinity where only y is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(x > 0, x * np.log(y), 0.0)
