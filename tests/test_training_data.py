"""Samples and their batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.feeds import SPEECH_INPUTS, TensorSpec
from onnx_intq.frontend import Frontend
from onnx_intq.manifest import Utterance, read_manifest
from onnx_intq.training_data import Sample, Samples, collate, crop, shared, speech_samples
from onnx_intq.transform import IntqError

FRONTEND = Frontend(sample_rate=8000, features=4)


def sample(frames: int, *, joins: bool = True, targets: tuple[int, ...] | None = None) -> Sample:
    x = np.arange(1, 2 * frames + 1, dtype=np.float32).reshape(1, 2, frames)
    feed = {"x": x, "length": np.array([frames])}
    return Sample(feed=feed, frames=frames, joins=joins, targets=targets)


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@given(LENGTHS, st.integers(1, 5), st.integers(0, 5))
def test_every_sample_comes_once_an_epoch(lengths: list[int], size: int, seed: int) -> None:
    data = Samples([sample(n) for n in lengths], size, seed)
    for epoch in range(2):
        steps = range(epoch * data.per_epoch, (epoch + 1) * data.per_epoch)
        batches = [data.at(step) for step in steps]
        assert sorted(s.frames for batch in batches for s in batch) == sorted(lengths)
        assert all(len(batch) <= size for batch in batches)


@given(LENGTHS, st.integers(0, 40))
def test_a_batch_depends_on_its_number_alone(lengths: list[int], step: int) -> None:
    samples = [sample(n) for n in lengths]
    forward, alone = (Samples(samples, 3, 0, longest=10) for _ in range(2))
    for earlier in range(step):
        forward.at(earlier)
    pairs = zip(forward.at(step), alone.at(step), strict=True)
    assert all(np.array_equal(a.feed["x"], b.feed["x"]) for a, b in pairs)


def test_epochs_differ_and_like_lengths_come_together() -> None:
    data = Samples([sample(n) for n in range(1, 101)], 10, 0)
    epochs = [[[s.frames for s in data.at(step)] for step in range(e, e + 10)] for e in (0, 10)]
    assert sorted(map(tuple, epochs[0])) != sorted(map(tuple, epochs[1]))
    assert all(max(batch) <= 1.3 * min(batch) + 15 for epoch in epochs for batch in epoch)


def test_what_cannot_be_joined_is_a_batch_of_its_own() -> None:
    data = Samples([sample(3), sample(3, joins=False), sample(4)], 8, 0)
    assert [len(batch) for batch in data.in_order()] == [2, 1]


def test_crops_are_at_random_places_but_in_order_from_the_beginning() -> None:
    data = Samples([sample(20), sample(3)], 1, 0, longest=5)
    crops = [s for step in range(20) for s in data.at(step) if s.frames == 5]
    starts = {float(s.feed["x"][0, 0, 0]) for s in crops}
    assert len(crops) == 10
    assert len(starts) > 3
    assert all(np.array_equal(s.feed["length"], [5]) for s in crops)
    assert [float(s.feed["x"][0, 0, 0]) for (s,) in data.in_order()] == [1, 1]
    assert crop(sample(4), 0, None).frames == crop(sample(4), 0, 9).frames == 4


@given(LENGTHS, st.floats(0, 0.9), st.integers(0, 3))
def test_held_out_samples_are_not_trained_on(lengths: list[int], share: float, seed: int) -> None:
    samples = [sample(n) for n in lengths]
    kept, held = shared(samples, share, seed)
    assert kept
    assert held
    if len(samples) > 1:
        assert len(kept) + len(held) == len(samples)
        assert not {id(s) for s in kept} & {id(s) for s in held}


def test_a_share_is_padded_like_the_whole() -> None:
    whole = [sample(3, targets=(1, 2)), sample(5, targets=())]
    batch = collate(whole[:1], whole, "cpu")
    assert batch.feed["x"].shape == (1, 2, 5)
    assert not batch.feed["x"][..., 3:].any()
    assert batch.feed["length"].tolist() == batch.frames.tolist() == [3]
    assert batch.targets[0].tolist() == [1, 2]
    both = collate(whole, whole, "cpu")
    assert torch.equal(both.feed["x"][:1], batch.feed["x"])
    assert both.targets[1].dtype == torch.int64


def test_a_batch_that_cannot_be_cut_counts_its_rows() -> None:
    feed = {"x": np.zeros((3, 2, 5), np.float32), "scalar": np.array(1, np.float32)}
    alone = Sample(feed=feed, frames=5, joins=False)
    assert alone.rows == 3
    batch = collate([alone], [alone], "cpu")
    assert batch.feed["scalar"].shape == ()
    assert batch.frames.tolist() == [5, 5, 5]


def test_speech_becomes_features_and_labels(speech: Path) -> None:
    ticks: list[tuple[int, int]] = []
    found = speech_samples(
        read_manifest(speech), FRONTEND, SPEECH_INPUTS, "a ", lambda *t: ticks.append(t)
    )
    assert [s.targets for s in found] == [(0, 1, 0)] * 2
    assert [s.frames for s in found] == [50, 55]
    assert all(s.joins for s in found)
    assert ticks == [(1, 2), (2, 2)]
    fixed = [TensorSpec(name="x", dtype=np.dtype(np.float32), shape=(1, 4, "time"))]
    (first, _) = speech_samples(read_manifest(speech), FRONTEND, fixed, None)
    assert first.targets is None
    assert not first.joins


def test_transcripts_are_needed_and_must_have_labels(speech: Path) -> None:
    (first, _) = read_manifest(speech)
    with pytest.raises(IntqError, match=r"0\.wav: transcript 'a a' has no labels from 'a a' on"):
        speech_samples([first], FRONTEND, SPEECH_INPUTS, "b")
    with pytest.raises(IntqError, match=r"0\.wav: has no transcript; expected the key text"):
        speech_samples([Utterance(audio=first.audio)], FRONTEND, SPEECH_INPUTS, "a ")
