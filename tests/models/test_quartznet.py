"""QuartzNet: sizes as published, trainable, and padding that changes nothing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.models.jasper_block import BlockConfig
from onnx_intq.models.quartznet import ACTIVATIONS, QuartzNet, QuartzNetConfig, quartznet_config
from onnx_intq.transform import IntqError

ROUNDING = 1e-12
"""Bound for float64: 2**-53 times some hundred additions of values of order 1, times a margin."""


def tiny(*, kernel: int = 5, stride: int = 2, dilation: int = 2) -> QuartzNetConfig:
    return QuartzNetConfig(
        blocks=(
            BlockConfig(filters=6, kernel=kernel, stride=stride, separable=True),
            BlockConfig(filters=6, kernel=kernel, repeat=2, residual=True, separable=True),
            BlockConfig(filters=8, kernel=kernel, dilation=dilation, dropout=0.1),
        ),
        labels=("a", "b", "c"),
        features=4,
    )


@pytest.mark.parametrize(("repeats", "count"), [(1, 6_713_181), (2, 12_818_781), (3, 18_924_381)])
def test_parameter_counts_are_the_published_ones(repeats: int, count: int) -> None:
    # Table 1 of the paper: 6.7, 12.8 and 18.9 million.
    with torch.device("meta"):
        network = QuartzNet(quartznet_config(repeats))
    assert sum(p.numel() for p in network.parameters()) == count


def test_gives_log_probabilities_of_every_second_frame() -> None:
    log_probs = QuartzNet(tiny()).eval()(torch.randn(2, 4, 31))
    assert log_probs.shape == (2, 16, 4)
    torch.testing.assert_close(log_probs.exp().sum(2), torch.ones(2, 16), rtol=0, atol=1e-6)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    kernel=st.sampled_from([1, 3, 9]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_padded_batch_gives_what_each_utterance_gives_alone(
    lengths: list[int], kernel: int, stride: int, dilation: int, seed: int
) -> None:
    torch.manual_seed(seed)
    network = QuartzNet(tiny(kernel=kernel, stride=stride, dilation=dilation)).double().eval()
    batch = torch.randn(len(lengths), 4, max(lengths), dtype=torch.float64)
    with torch.no_grad():
        together, valid = network(batch, torch.tensor(lengths))
        for row, (length, frames) in enumerate(zip(lengths, valid, strict=True)):
            (alone,) = network(batch[row : row + 1, :, :length])
            assert len(alone) == frames
            torch.testing.assert_close(together[row, :frames], alone, rtol=0, atol=ROUNDING)


def test_length_beyond_the_batch_means_all_of_it() -> None:
    _, valid = QuartzNet(tiny()).eval()(torch.randn(2, 4, 10), torch.tensor([99, 0]))
    assert valid.tolist() == [5, 0]


def test_every_parameter_is_trained() -> None:
    network = QuartzNet(tiny()).train()
    network(torch.randn(3, 4, 20), torch.tensor([20, 11, 6]))[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_run(activation: str) -> None:
    config = QuartzNetConfig(blocks=tiny().blocks, features=4, activation=activation)
    assert QuartzNet(config).eval()(torch.randn(1, 4, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"blocks": ()}, "is empty"),
        ({"labels": ()}, "is empty"),
        ({"features": 0}, "is empty"),
        ({"activation": "sine"}, "unknown activation 'sine'; expected one of: relu"),
    ],
)
def test_refuses(options: dict[str, Any], reason: str) -> None:
    valid: dict[str, Any] = {"blocks": tiny().blocks}
    with pytest.raises(IntqError, match=reason):
        QuartzNetConfig(**valid | options)
