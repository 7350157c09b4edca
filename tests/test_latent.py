from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.latent import NEGLIGIBLE, Latent, correlated, taps, uniform


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.floats(0.0, 0.98))
def test_the_filter_has_norm_one_and_keeps_all_that_matters(correlation: float) -> None:
    response = taps(correlation).double()
    assert response.norm().item() == pytest.approx(1, abs=1e-6)
    assert correlation ** len(response) <= NEGLIGIBLE


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.floats(0.0, 0.9))
def test_the_input_has_the_shape_asked_for(shape: list[int], correlation: float) -> None:
    assert list(correlated(shape, correlation, generator()).value().shape) == shape


@pytest.mark.parametrize("axis", [1, 2])
def test_neighbours_along_every_axis_but_the_first_correlate(axis: int) -> None:
    x = correlated((64, 40, 100), 0.9, generator()).value()
    assert x.var().item() == pytest.approx(1, abs=0.1)
    length = x.shape[axis]
    near = x.narrow(axis, 1, length - 1) * x.narrow(axis, 0, length - 1)
    far = x.narrow(axis, 10, length - 10) * x.narrow(axis, 0, length - 10)
    # About 64 * 4000 / (19 * 19) independent values: a standard error of 0.04.
    assert near.mean().item() == pytest.approx(0.9, abs=0.12)
    assert far.mean().item() == pytest.approx(0.9**10, abs=0.12)
    assert abs((x[1:] * x[:-1]).mean().item()) < 0.12


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(1, 60), st.floats(0.0, 0.95))
def test_the_filter_multiplies_with_the_cholesky_factor(size: int, correlation: float) -> None:
    noise = torch.eye(size)
    factor = Latent(noise, (1,), correlation).value().T.double()
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    covariance = torch.full((size, size), correlation, dtype=torch.float64).pow(distance)
    # The cut-off taps, and their share in the norm of the others, are at most NEGLIGIBLE each.
    torch.testing.assert_close(factor @ factor.T, covariance, rtol=0, atol=2 * NEGLIGIBLE)


def test_without_correlation_the_noise_is_the_input() -> None:
    latent = correlated((2, 3, 5), 0.0, generator())
    assert torch.equal(latent.value(), latent.noise)


def test_a_normalized_input_has_mean_zero_and_deviation_one_along_that_axis() -> None:
    x = correlated((2, 3, 50), 0.9, generator(), normalized=2).value()
    # 50 float32 values of size 1: rounding moves a mean or variance by some 1e-7.
    torch.testing.assert_close(x.mean(2), torch.zeros(2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(2), torch.ones(2, 3), rtol=0, atol=1e-5)


def test_gain_and_offset_come_after_the_filter_and_padding_last() -> None:
    plain = correlated((2, 3, 50), 0.9, generator(), normalized=2)
    x = replace(plain, gain=0.5, offset=-2.0).value()
    torch.testing.assert_close(x, plain.value() * 0.5 - 2, rtol=0, atol=1e-6)
    padded = replace(plain, gain=0.5, offset=-2.0, padding=(2, 30)).value()
    assert torch.equal(padded[:, :, :30], x[:, :, :30])
    assert torch.equal(padded[:, :, 30:], x[:, :, :30].amin().expand(2, 3, 20))


def test_gradients_reach_all_the_noise() -> None:
    latent = correlated((1, 4, 6), 0.5, generator())
    latent.noise.requires_grad_()
    latent.value().square().sum().backward()  # type: ignore[no-untyped-call]
    assert latent.noise.grad is not None
    assert latent.noise.grad.count_nonzero() == latent.noise.numel()


def test_uniform_values_fill_their_interval() -> None:
    x = uniform((4, 100, 10), 0.3, generator()).value()
    assert x.abs().max() <= 0.3
    # The spread of the extremes of 4000 values is 0.6 / 4000.
    assert x.min() < -0.297
    assert x.max() > 0.297
    assert abs(x.mean().item()) < 5 * 0.3 / (3 * 4000) ** 0.5


def test_the_same_seed_gives_the_same_bytes() -> None:
    pair = [correlated((2, 3, 5), 0.9, generator(7)).value() for _ in range(2)]
    assert torch.equal(*pair)
    assert not torch.equal(pair[0], correlated((2, 3, 5), 0.9, generator(8)).value())


def test_a_latent_without_axes_is_its_noise() -> None:
    noise = torch.arange(6.0).reshape(2, 3)
    assert Latent(noise).value() is noise
