"""Second moments of what a product's weight rows are multiplied with, over data.

A convolution with one input channel per group along one axis sees shifts of one signal: all its
moments are correlations of that signal, which one Fourier transform gives. Windows that overlap
the signal's ends count too, whatever the padding, and all positions, whatever the stride.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.patches import patches, rows

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

POSITIONS, PER_TAP = 4096, 4
"""Positions drawn for one product: at least so many, and so many for every tap."""
VALUES = 1 << 26
"""Unless they hold more values than this."""
CHUNK = 2048
"""Taps whose moments are taken together: bounds time and memory of what grows with their square."""
SMOOTH = 64
"""Lengths of Fourier transforms are multiples of this, for speed."""


def moments(
    node: gs.Node, index: int, weight: Array, a: Sequence[Array], b: Sequence[Array]
) -> Iterator[tuple[slice, Float32, Float32]]:
    """E[b b'] and E[a b'] of the patches of two inputs of one product, for chunks of taps.

    Args:
        node: A product that `patches.reason_against` has nothing against.
        index: Which of its inputs is the weight.
        weight: Its values.
        a: The other input, one array per batch.
        b: The same tensors, computed otherwise.

    Yields:
        At most `CHUNK` taps, and the moments among them, float32 [groups, taps, taps] each.
    """
    if node.op == "Conv" and weight.ndim == 3 and weight.shape[1] == 1:
        taps, step = weight.shape[2], node.attrs.get("dilations", [1])[0]
        lags = step * (np.arange(taps)[:, None] - np.arange(taps))
        own, across = _correlations(a, b, taps * step)
        yield slice(0, taps), own[:, lags], across[:, lags]
        return
    x, y = (_patches(node, index, weight, each) for each in (a, b))
    for first in range(0, x.shape[-1], CHUNK):
        chunk = slice(first, first + CHUNK)
        of_x, of_y = x[..., chunk], y[..., chunk]
        own, across = np.swapaxes(of_y, 1, 2) @ of_y, np.swapaxes(of_x, 1, 2) @ of_y
        yield chunk, own / y.shape[1], across / y.shape[1]


def _correlations(a: Sequence[Array], b: Sequence[Array], lags: int) -> tuple[Array, Array]:
    """Means of b(t + lag) b(t) and of a(t + lag) b(t), [channels, lags].

    A negative lag counts from the end.
    """
    own, across = np.zeros((2, b[0].shape[1], 2 * lags))
    count = 0
    for x, y in zip(a, b, strict=True):
        length = -(-(x.shape[-1] + lags) // SMOOTH) * SMOOTH
        of_x, of_y = (np.fft.rfft(each, length) for each in (x, y))
        own += _around_zero((of_y * np.conj(of_y)).sum(axis=0), length, lags)
        across += _around_zero((of_x * np.conj(of_y)).sum(axis=0), length, lags)
        count += x.shape[0] * x.shape[-1]
    return (own / count).astype(np.float32), (across / count).astype(np.float32)


def _around_zero(spectrum: Array, length: int, lags: int) -> Array:
    """The signal's values at 0 .. lags - 1, then at -lags .. -1."""
    found = np.fft.irfft(spectrum, length)
    return np.concatenate([found[:, :lags], found[:, -lags:]], axis=1)


def _patches(node: gs.Node, index: int, weight: Array, batches: Sequence[Array]) -> Array:
    """Patches of all batches, [groups, positions, taps]."""
    groups, _, taps = rows(node, index, weight).shape
    most = max(min(max(POSITIONS, PER_TAP * taps), VALUES // (groups * taps)), len(batches))
    share, kernel = -(-most // len(batches)), weight.shape[2:]
    found = [
        patches(node, index, kernel, values, share, seed) for seed, values in enumerate(batches)
    ]
    return np.concatenate(found, axis=1)
