"""Nearest levels: the values against NumPy, and the gradient that passes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.straight_through import FINE, LARGEST, nearest

LEVELS = st.lists(st.integers(-LARGEST, LARGEST), min_size=2, max_size=255, unique=True).map(sorted)


@given(levels=LEVELS, seed=st.integers(0, 99))
def test_values_are_the_nearest_levels_of_the_rounded_weights(levels: list[int], seed: int) -> None:
    latent = torch.from_numpy(np.random.default_rng(seed).uniform(-150, 150, (5, 7)))
    found = nearest(latent.float(), torch.tensor(levels, dtype=torch.float32))
    rounded = np.rint(np.clip(latent.float().numpy(), -LARGEST, LARGEST) * FINE) / FINE
    distances = np.abs(rounded[..., None] - np.array(levels))
    assert found.shape == latent.shape
    assert set(found.int().flatten().tolist()) <= set(levels)
    np.testing.assert_array_equal(np.abs(found.numpy() - rounded), distances.min(-1))


def test_gradient_goes_to_values_inside_the_levels_and_to_each_level() -> None:
    latent = torch.tensor([[-20.0, -9.0, 1.0], [4.0, 12.0, 9.0]], requires_grad=True)
    levels = torch.tensor([-10.0, 0.0, 10.0], requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (nearest(latent, levels) * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert latent.grad is not None
    assert levels.grad is not None
    assert latent.grad.tolist() == [[0, 2, 3], [4, 0, 6]]
    assert levels.grad.tolist() == [3, 7, 11]
