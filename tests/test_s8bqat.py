"""S8BQAT: the regularizer and the hard compression."""

from __future__ import annotations

import numpy as np
import torch

from onnx_intq.s8bqat import COMPRESSED_EVERY, LAST, RegularizedQuantizer
from tests.test_schemes import weight


def test_penalty_is_zero_on_centroids_and_one_between() -> None:
    made = RegularizedQuantizer(weight(), 0, 2)
    between = (made.levels[1:] + made.levels[:-1]) / 2
    for values, wanted in ((made.levels, 0.0), (between, 1.0)):
        with torch.no_grad():
            made.latent.copy_(values.repeat(200)[: made.latent.numel()].view_as(made.latent))
        assert abs(made.penalty().item() - wanted) < 1e-5


def test_weights_are_compressed_now_and_then_and_at_last_always() -> None:
    made = RegularizedQuantizer(weight(), 0, 2)
    for _ in range(COMPRESSED_EVERY - 1):
        made.after_step(0.1)
        assert len(made.latent.unique()) > 4
    made.after_step(0.1)
    assert len(made.latent.unique()) <= 4
    with torch.no_grad():
        made.latent += 0.3
    made.after_step(LAST)
    assert np.isin(made.latent.detach().numpy(), made.levels.numpy()).all()


def test_forward_is_the_float_weight_until_the_end() -> None:
    w = weight()
    made = RegularizedQuantizer(w, 0, 2)
    np.testing.assert_allclose(made(0.5).detach().numpy(), w, rtol=1e-5)
    assert not made.log_scale.requires_grad
