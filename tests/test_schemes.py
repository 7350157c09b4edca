"""What every scheme of quantization-aware training promises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.codebook import code
from onnx_intq.schemes import SCHEMES, quantizer

Uneven = Callable[..., npt.NDArray[np.float32]]


@pytest.mark.parametrize("scheme", SCHEMES)
@given(bits=st.integers(1, 8), axis=st.sampled_from([0, 1, None]), seed=st.integers(0, 20))
def test_stored_is_what_the_last_forward_gives(
    scheme: str, bits: int, axis: int | None, seed: int, uneven: Uneven
) -> None:
    made = quantizer(scheme, uneven(seed), axis, bits)
    coded = made.coded()
    np.testing.assert_array_equal(coded.dequantized(), made(1.0).detach().numpy())
    assert len(coded.centroids) <= 1 << bits
    assert coded.stored.dtype == np.int8
    assert coded.bits == bits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_starts_close_to_the_training_free_weights(scheme: str, uneven: Uneven) -> None:
    w = uneven()
    for bits in (2, 4, 6, 8):
        kind = "uniform" if scheme == "uniform" else "lloyd"
        free = np.square(code(w, 0, bits, kind).dequantized() - w).sum(1)
        made = np.square(quantizer(scheme, w, 0, bits).coded().dequantized() - w).sum(1)
        assert (made <= 1.3 * free + 1e-12).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_lowers_the_loss_that_rounding_raised(scheme: str, uneven: Uneven) -> None:
    """A regression with more inputs than weights: what one weight loses, others can make up for."""
    torch.manual_seed(0)
    w, x = uneven(), torch.randn(200, 40) @ torch.randn(40, 40)
    made = quantizer(scheme, w, 0, 2)
    wanted = x @ torch.from_numpy(w).T

    def loss(progress: float) -> torch.Tensor:
        weight: torch.Tensor = made(progress)
        return ((x @ weight.T - wanted) / wanted.std(0)).square().mean()

    start = loss(1.0).item()
    rates = {"latent": 0.5}
    groups = [{"params": [p], "lr": rates.get(n, 2e-3)} for n, p in made.named_parameters()]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for step in range(200):
        penalty = made.penalty()
        optimizer.zero_grad()
        value = loss(step / 200) + (0 if penalty is None else 0.01 * penalty)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        made.after_step(step / 200)
    assert loss(1.0).item() < 0.95 * start


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dead_channels_stay_dead(scheme: str, uneven: Uneven) -> None:
    w = uneven()
    w[2] = 0
    found = quantizer(scheme, w, 0, 3).coded().dequantized()
    assert np.isfinite(found).all()
    assert np.abs(found[2]).max() < 1e-9
