"""Second moments of what a product's weight rows are multiplied with, over data.

A convolution with one input channel per group along one axis sees shifts of one signal: all its
moments are correlations of that signal, which one Fourier transform gives. Windows that overlap
the signal's ends count too, whatever the padding, and all positions, whatever the stride.
"""

from __future__ import annotations

from collections.abc import Sequence
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
SMOOTH = 64
"""Lengths of Fourier transforms are multiples of this, for speed."""


def moments(
    node: gs.Node, index: int, weight: Array, a: Sequence[Array], b: Sequence[Array]
) -> tuple[Float32, Float32]:
    """E[b b'] and E[a b'] of the patches of two inputs of one product.

    Args:
        node: A product that `patches.reason_against` has nothing against.
        index: Which of its inputs is the weight.
        weight: Its values.
        a: The other input, one array per batch.
        b: The same tensors, computed otherwise.

    Returns:
        float32 [groups, taps, taps] each.
    """
    if node.op == "Conv" and weight.ndim == 3 and weight.shape[1] == 1:
        taps, step = weight.shape[2], node.attrs.get("dilations", [1])[0]
        lags = step * (np.arange(taps)[:, None] - np.arange(taps))
        own, across = _correlations(a, b, taps * step)
        return own[:, lags], across[:, lags]
    x, y = (_patches(node, index, weight, each) for each in (a, b))
    own, across = np.swapaxes(y, 1, 2) @ y, np.swapaxes(x, 1, 2) @ y
    own /= y.shape[1]
    across /= y.shape[1]
    return own, across


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
