"""Mergeable one-sweep observers: a histogram of a tensor's values over the bfloat16 grid.

A value's bin is the upper half of its float32 bit pattern: 128 bins per octave, so every bin is
narrower than 0.8 % of its values, whatever the tensor's range; no pass over the data is needed to
find the range first. Counts are exact integers. Laws: merging is associative and commutative, and
the result depends neither on the order of the data nor on how it is cut into pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_intq.transform import IntqError

BINS = 1 << 16
"""Upper halves of a float32."""
INFINITE = 0x7F80
"""The upper half of infinity: of either sign, the bins from here on hold infinities and NaN."""
CHUNK = 1 << 18
"""Values counted at a time: bounds the memory of the 64-bit bin numbers `bincount` works on."""
POINT = 2.0**-20
"""Relative width given to a bin whose values are all the same."""

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Density:
    """How a tensor's nonzero values are spread, uniformly within each bin, ascending.

    Zeros are left out: they lie on every quantization grid exactly.

    Attributes:
        lower: The bins' lower edges, float64 [bins].
        upper: Their upper edges, above `lower`; within the smallest and largest value seen.
        counts: Values in each bin, never 0, float64 [bins].
    """

    lower: Float64
    upper: Float64
    counts: Float64


@dataclass(eq=False)
class Histogram:
    """What is kept of a tensor: exact counts per bin, and the exact smallest and largest value.

    Attributes:
        counts: int64 [65536], indexed by the upper half of the float32 pattern.
        low: Smallest value seen, +inf before the first.
        high: Largest value seen, -inf before the first.
    """

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    low: float = float("inf")
    high: float = float("-inf")

    @property
    def count(self) -> int:
        """How many values were seen."""
        return int(self.counts.sum())

    def update(self, values: npt.NDArray[Any], name: str) -> None:
        """Count `values` (float32, any shape), which belong to tensor `name`.

        Raises:
            IntqError: A value is NaN or infinite; nothing has been counted then.
        """
        if not values.size:
            return
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        low, high = float(flat.min()) + 0.0, float(flat.max()) + 0.0
        if not np.isfinite([low, high]).all():
            found = "NaN" if np.isnan(low) else "infinity"
            raise IntqError(
                f"tensor {name!r} holds {found}; expected finite values; "
                "check the data and the model's float results"
            )
        patterns = flat.view(np.uint32)
        for start in range(0, flat.size, CHUNK):
            counts = np.bincount(patterns[start : start + CHUNK] >> 16)
            self.counts[: counts.size] += counts
        self.low, self.high = min(self.low, low), max(self.high, high)

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both one's values together."""
        return Histogram(
            self.counts + other.counts, min(self.low, other.low), max(self.high, other.high)
        )

    def density(self) -> Density:
        """The distribution of the nonzero values, in ascending order."""
        edges, counts = self.ascending()
        seen = np.flatnonzero(counts)
        seen = seen[(seen != INFINITE) & (seen != INFINITE - 1)]
        lower, upper = np.maximum(edges[seen], self.low), np.minimum(edges[seen + 1], self.high)
        point = upper <= lower
        lower = np.where(point & (upper > 0), lower * (1 - POINT), lower)
        upper = np.where(point & (upper < 0), upper * (1 - POINT), upper)
        return Density(lower, upper, counts[seen].astype(np.float64))

    def ascending(self) -> tuple[Float64, npt.NDArray[np.int64]]:
        """The finite bins in the order of their values: edges [2 * 32640 + 1], counts one fewer.

        The two bins at the middle, numbers 32639 and 32640, are those of -0 and +0.
        """
        patterns = np.arange(INFINITE + 1, dtype=np.uint32) << 16
        edges = patterns.view(np.float32).astype(np.float64)
        negative = self.counts[BINS // 2 : BINS // 2 + INFINITE]
        counts = np.concatenate([negative[::-1], self.counts[:INFINITE]])
        return np.concatenate([-edges[::-1], edges[1:]]), counts
