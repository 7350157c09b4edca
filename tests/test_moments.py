from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.moments import moments
from onnx_intq.patches import patches


def conv(**attrs: object) -> gs.Node:
    return gs.Node("Conv", "c", dict(attrs))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_moments_of_patches() -> None:
    node, w = conv(pads=[1, 1]), random(5, 3, 3)
    a, b = ([random(2, 3, 8 + i, seed=s + i) for i in range(2)] for s in (1, 7))
    ((_, own, across),) = moments(node, 1, w, a, b)
    x, y = (np.concatenate([patches(node, 1, (3,), v, 99, 0)[0] for v in vs]) for vs in (a, b))
    np.testing.assert_allclose(own[0], y.T @ y / len(y), rtol=0, atol=1e-5)
    np.testing.assert_allclose(across[0], x.T @ y / len(x), rtol=0, atol=1e-5)


def test_correlations_are_moments_of_windows_over_the_padded_signal() -> None:
    taps, step = 4, 3
    reach = (taps - 1) * step
    node, w = conv(pads=[reach, reach], group=2, dilations=[step]), random(2, 1, taps)
    a, b = ([random(3, 2, 50, seed=s), random(1, 2, 61, seed=s + 1)] for s in (1, 7))
    ((_, own, across),) = moments(node, 1, w, a, b)
    x, y = (
        np.concatenate([patches(node, 1, (taps,), v, 9999, 0) for v in vs], axis=1) for vs in (a, b)
    )
    count = sum(v.shape[0] * v.shape[-1] for v in a)
    np.testing.assert_allclose(own, np.swapaxes(y, 1, 2) @ y / count, rtol=0, atol=1e-5)
    np.testing.assert_allclose(across, np.swapaxes(x, 1, 2) @ y / count, rtol=0, atol=1e-5)


def test_many_taps_come_in_chunks_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    node, w = conv(), random(2, 5, 3)
    a, b = ([random(2, 5, 9, seed=s)] for s in (1, 2))
    ((_, whole, crossed),) = moments(node, 1, w, a, b)
    monkeypatch.setattr("onnx_intq.moments.CHUNK", 6)
    found = list(moments(node, 1, w, a, b))
    assert [len(range(15)[chunk]) for chunk, _, _ in found] == [6, 6, 3]
    for chunk, own, across in found:
        np.testing.assert_allclose(own, whole[:, chunk, chunk], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(across, crossed[:, chunk, chunk], rtol=1e-5, atol=1e-6)
