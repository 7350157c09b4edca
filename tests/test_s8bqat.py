"""S8BQAT: the regularizer and the hard compression."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from onnx_intq.s8bqat import COMPRESSED_EVERY, LAST, RegularizedQuantizer

Uneven = Callable[..., npt.NDArray[np.float32]]


def test_penalty_is_zero_on_centroids_and_one_between(uneven: Uneven) -> None:
    made = RegularizedQuantizer(uneven(), 0, 2)
    between = (made.levels[1:] + made.levels[:-1]) / 2
    for values, wanted in ((made.levels, 0.0), (between, 1.0)):
        with torch.no_grad():
            made.latent.copy_(values.repeat(200)[: made.latent.numel()].view_as(made.latent))
        assert abs(made.penalty().item() - wanted) < 1e-5


def test_weights_are_compressed_now_and_then_and_at_last_always(uneven: Uneven) -> None:
    made = RegularizedQuantizer(uneven(), 0, 2)
    for _ in range(COMPRESSED_EVERY - 1):
        made.after_step(0.1)
        assert len(np.unique(made.latent.detach())) > 4
    made.after_step(0.1)
    assert len(np.unique(made.latent.detach())) <= 4
    with torch.no_grad():
        made.latent.add_(0.3)
    made.after_step(LAST)
    assert np.isin(made.latent.detach().numpy(), made.levels.numpy()).all()


def test_forward_is_the_float_weight_until_the_end(uneven: Uneven) -> None:
    w = uneven()
    made = RegularizedQuantizer(w, 0, 2)
    np.testing.assert_allclose(made(0.5).detach().numpy(), w, rtol=1e-5)
    assert not made.log_scale.requires_grad
