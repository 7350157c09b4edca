"""Uniform levels: which, and how the scale learns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from onnx_intq.learned_scale import UniformQuantizer

Uneven = Callable[..., npt.NDArray[np.float32]]


def test_levels_are_even_and_of_one_bit_two(uneven: Uneven) -> None:
    for bits, count in ((1, 2), (2, 3), (4, 15), (8, 255)):
        levels = UniformQuantizer(uneven(), 0, bits).levels.numpy()
        assert len(levels) == count
        assert len(np.unique(np.diff(levels))) == 1
        np.testing.assert_array_equal(levels, -levels[::-1])


def test_gradient_of_the_scale_is_that_of_the_result(uneven: Uneven) -> None:
    made = UniformQuantizer(uneven(), 0, 3)
    made(0.0).sum().backward()
    assert made.log_scale.grad is not None
    torch.testing.assert_close(made.log_scale.grad, made(0.0).sum(1, keepdim=True).detach())
