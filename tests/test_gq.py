"""The General Quantizer: annealing, sorted centroids, gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from onnx_intq.gq import FREEZE, SOFT, GeneralQuantizer

Uneven = Callable[..., npt.NDArray[np.float32]]


def test_mixtures_harden_into_the_nearest_centroids(uneven: Uneven) -> None:
    made = GeneralQuantizer(uneven(), 0, 3)
    hard = made(1.0)
    with torch.no_grad():
        apart = [(made(share * SOFT) - hard).abs().mean().item() for share in (0, 0.3, 0.6, 0.99)]
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 0.35 * apart[0]


def test_soft_mixtures_pass_gradients_to_weights_centroids_and_scales(uneven: Uneven) -> None:
    made = GeneralQuantizer(uneven(), 0, 3)
    made(0.3 * SOFT).square().sum().backward()
    for tensor in (made.latent, made.theta, made.log_scale):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_gradient_of_a_soft_mixture_is_exact(uneven: Uneven) -> None:
    made = GeneralQuantizer(uneven(1, (2, 9)), 0, 2).double()
    with torch.no_grad():
        made.latent.mul_(0.9)  # away from the end of the range
    parameters = (made.latent, made.theta, made.log_scale)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(("latent", "theta", "log_scale"), tensors, strict=True))
        result: torch.Tensor = torch.func.functional_call(made, named, (0.3 * SOFT,))
        return result

    assert torch.autograd.gradcheck(run, parameters, eps=1e-7, atol=1e-3)


def test_centroids_stay_sorted_within_the_range_and_freeze_at_last(uneven: Uneven) -> None:
    made = GeneralQuantizer(uneven(), 0, 3)
    with torch.no_grad():
        made.theta.copy_(torch.tensor([0.5, -2.0, 0.1, 3.0, 0.0, -0.1, 0.2, 0.3]))
    made.after_step(0.5)
    assert made.theta.tolist() == pytest.approx([-1, -0.1, 0, 0.1, 0.2, 0.3, 0.5, 1])
    assert made.theta.requires_grad
    made.after_step(FREEZE)
    assert not made.theta.requires_grad


def test_larger_mu_puts_the_same_centroids_elsewhere_in_the_companded_space(uneven: Uneven) -> None:
    w = uneven()
    some, more = (GeneralQuantizer(w, 0, 4, mu=mu) for mu in (1.0, 100.0))
    np.testing.assert_array_equal(some.coded().stored, more.coded().stored)
    assert (more.theta.abs() >= some.theta.abs() - 1e-6).all()
