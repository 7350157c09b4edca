"""Sliding windows over NumPy arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from onnx_intq import windows
from onnx_intq.integer_ops.arrays import Array


class Windows(windows.Windows):
    """Windows over the spatial axes of an array."""

    def pad(self, x: Array, value: int = 0) -> Array:
        """`x` [N, C, *spatial] with the padding filled by `value`; a negative one crops."""
        if not any(self.begins) and not any(self.ends):
            return x
        kept = [slice(size + min(end, 0)) for size, end in zip(x.shape[2:], self.ends, strict=True)]
        sides = [(begin, max(end, 0)) for begin, end in zip(self.begins, self.ends, strict=True)]
        return np.pad(x[:, :, *kept], [(0, 0), (0, 0), *sides], constant_values=value)

    def taps(self, padded: Array) -> Iterator[Array]:
        """For each tap of the kernel, in its order, what it sees: [N, C, *windows], a view."""
        sizes = padded.shape[2:]
        counts = [
            (size - (kernel - 1) * dilation - 1) // stride + 1
            for size, kernel, dilation, stride in zip(
                sizes, self.kernel, self.dilations, self.strides, strict=True
            )
        ]
        for tap in itertools.product(*map(range, self.kernel)):
            starts = [i * dilation for i, dilation in zip(tap, self.dilations, strict=True)]
            cuts = [
                slice(start, start + (count - 1) * stride + 1, stride)
                for start, count, stride in zip(starts, counts, self.strides, strict=True)
            ]
            yield padded[:, :, *cuts]
