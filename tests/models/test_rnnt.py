"""The network: what it computes in chunks and step by step, and configurations that are refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.models.rnnt import Rnnt, RnntConfig
from onnx_intq.models.rnnt_encoder import States
from onnx_intq.transform import IntqError

SMALL = RnntConfig(
    labels=tuple("abc"), features=4, factor=3, width=6, predictor=5, predictor_layers=2, joint=4
)


def network(config: RnntConfig = SMALL) -> Rnnt:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Rnnt(config).eval()


@settings(max_examples=30)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 2))
def test_chunks_of_whole_stacks_give_what_the_whole_gives(stacks: list[int], lost: int) -> None:
    encoder = network().encoder.double()
    frames = SMALL.factor * sum(stacks) - lost  # the last stack may be short
    signal = torch.randn(2, SMALL.features, frames, dtype=torch.float64)
    with torch.no_grad():
        whole, (h, c) = encoder(signal)
        assert whole.shape == (2, sum(stacks), SMALL.width)
        states: States | None = None
        parts = []
        for chunk in _chunks(signal, stacks):
            part, states = encoder(chunk, states)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert states is not None
    torch.testing.assert_close(states, (h, c))


def _chunks(signal: torch.Tensor, stacks: list[int]) -> list[torch.Tensor]:
    ends = [SMALL.factor * sum(stacks[: n + 1]) for n in range(len(stacks))]
    starts = [0, *ends[:-1]]
    return [signal[:, :, start:end] for start, end in zip(starts, ends, strict=True)]


def test_no_frame_depends_on_a_later_one() -> None:
    encoder, signal = network().encoder, torch.randn(1, SMALL.features, 12)
    changed = signal.clone()
    changed[:, :, 6:] += 1
    with torch.no_grad():
        before, after = encoder(signal)[0], encoder(changed)[0]
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2:], after[:, 2:])


def test_labels_one_by_one_give_what_all_give() -> None:
    decoder, labels = network().decoder, torch.tensor([[3, 0, 1], [3, 2, 2]])
    states: States | None = None
    parts = []
    with torch.no_grad():
        whole, last = decoder(labels)
        for label in (labels[:, :1], labels[:, 1:2], labels[:, 2:]):
            part, states = decoder(label, states)
            parts.append(part)
    assert whole.shape == (2, 3, SMALL.predictor)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(states, last)


def test_training_scores_each_frame_after_each_label() -> None:
    found, signal = network(), torch.randn(2, SMALL.features, 7)
    labels = torch.tensor([[0, 1], [2, 2]])
    with torch.no_grad():
        logits = found(signal, labels)
        encoded, _ = found.encoder(signal)
        predicted, _ = found.decoder(torch.tensor([[3, 0], [3, 2]]))
        alone = found.joint(encoded[1:, 2:], predicted[1:, 1:])
    assert logits.shape == (2, 3, 3, 4)
    torch.testing.assert_close(logits[1:, 2:, 1:2], alone)


def test_initial_gates_are_open_and_the_blank_is_embedded_as_zeros() -> None:
    found = network()
    lstms = [*found.encoder.lstms, found.decoder.prediction.dec_rnn.lstm]
    for lstm in lstms:
        gate = slice(lstm.hidden_size, 2 * lstm.hidden_size)
        bias = dict(lstm.named_parameters())
        assert (bias["bias_ih_l0"][gate] == 1).all()
        assert (bias["bias_hh_l0"][gate] == 0).all()
    assert not found.decoder.prediction.embed.weight[-1].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ()}, "an RNN-T needs labels"),
        ({"factor": 0}, "one is empty"),
        ({"joint": 0}, "one is empty"),
        ({"activation": "selu"}, "unknown activation 'selu'; expected one of: relu, sigmoid, tanh"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_other_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(IntqError, match=message):
        RnntConfig(**changes)
