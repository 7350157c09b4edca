"""Conformer: sizes as published, trainable, and padding that changes nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.models.conformer import Conformer, ConformerConfig, conformer_config
from onnx_intq.models.conformer_block import ConformerBlockConfig
from onnx_intq.models.subsampling import STAGES
from onnx_intq.transform import IntqError

ROUNDING = 1e-11
"""For float64: 2**-53 times some thousand additions of values of order 1, times a margin."""
TINY = ConformerConfig(
    block=ConformerBlockConfig(width=8, heads=2, kernel=5, expansion=2),
    layers=2,
    labels=("a", "b", "c"),
    features=6,
    longest=40,
)


@pytest.mark.parametrize(
    ("size", "labels", "count"),
    [("small", 128, 12_995_441), ("medium", 128, 30_538_625), ("large", 128, 121_501_313)],
)
def test_parameter_counts_are_the_published_ones(size: str, labels: int, count: int) -> None:
    # NeMo: 13, 30 and 121 million, one block more than the paper's 118.8 million for large.
    config = replace(conformer_config(size), labels=tuple(map(str, range(labels))))
    with torch.device("meta"):
        network = Conformer(config)
    assert sum(p.numel() for p in network.parameters()) == count


def test_gives_log_probabilities_of_every_fourth_frame() -> None:
    log_probs = Conformer(TINY).eval()(torch.randn(2, 6, 31))
    assert log_probs.shape == (2, 8, 4)
    torch.testing.assert_close(log_probs.exp().sum(2), torch.ones(2, 8), rtol=0, atol=1e-6)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    subsampling=st.sampled_from(list(STAGES)),
    scaled=st.booleans(),
    seed=st.integers(0, 9),
)
def test_padded_batch_gives_what_each_utterance_gives_alone(
    lengths: list[int], subsampling: str, scaled: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    config = replace(TINY, subsampling=subsampling, scaled=scaled, channels=3)
    network = Conformer(config).double().eval()
    batch = torch.randn(len(lengths), 6, max(lengths), dtype=torch.float64)
    with torch.no_grad():
        together, valid = network(batch, torch.tensor(lengths))
        for row, (length, frames) in enumerate(zip(lengths, valid, strict=True)):
            alone = network(batch[row : row + 1, :, :length])
            assert alone.shape[1] == frames
            torch.testing.assert_close(together[row, :frames], alone[0], rtol=0, atol=ROUNDING)


def test_every_parameter_trains() -> None:
    network = Conformer(TINY).train()
    log_probs, lengths = network(torch.randn(2, 6, 60), torch.tensor([60, 41]))
    targets, sizes = torch.tensor([[0, 1], [2, 0]]), torch.tensor([2, 2])
    loss = torch.nn.functional.ctc_loss(log_probs.transpose(0, 1), targets, lengths, sizes, blank=3)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in network.named_parameters():
        # Keys' bias moves all scores of a row alike, which the softmax does not see.
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved or name.endswith("linear_k.bias"), name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": 0}, "one is empty"),
        ({"labels": ()}, "one is empty"),
        ({"channels": 0}, "one is empty"),
        ({"subsampling": "none"}, "unknown sub-sampling 'none'; expected one of: striding, vggnet"),
        ({"factor": 3}, "factor is 3; expected a power of two"),
        ({"factor": 1}, "factor is 1"),
        ({"input_dropout": 1.0}, "dropout must lie in"),
        ({"position_dropout": -1.0}, "dropout must lie in"),
    ],
)
def test_refuses_what_cannot_be_built(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(IntqError, match=reason):
        replace(TINY, **change)


def test_input_longer_than_its_positions_is_refused() -> None:
    with pytest.raises(IntqError, match="input has 41 frames after sub-sampling"):
        Conformer(TINY)(torch.randn(1, 6, 161))
