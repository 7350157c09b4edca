"""Beam search against the RNN-T loss and an exhaustive search, on small random networks."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.beam_search import BeamSearch
from onnx_intq.greedy_search import GreedySearch
from onnx_intq.transducer import States, Transducer
from onnx_intq.transducer_loss import transducer_loss

CLASSES = 3
few = settings(max_examples=30)


class Table(Transducer):
    """A network whose scores depend on the frame and on the labels before, at random."""

    def __init__(self, seed: int, sharpness: float = 2.0) -> None:
        self._seed, self._sharpness = seed, sharpness

    def start(self, part: str) -> States:
        assert part == "predictor"
        return States(h=np.zeros((1, 1, 1), np.float32), c=np.zeros((1, 1, 1), np.float32))

    def predict(self, labels: np.ndarray, states: States) -> tuple[np.ndarray, States]:
        # The labels so far as a number in base 4, small enough for float32.
        h = states.h * 4 + (labels + 1)[None, :, None].astype(np.float32)
        return h[0][:, None], States(h=h, c=states.c)

    def log_probs(self, frame: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
        rows = []
        for number in predicted[:, 0, 0]:
            random = np.random.default_rng([self._seed, int(frame[0]), int(number)])
            scores = self._sharpness * random.standard_normal(classes)
            rows.append(scores - np.log(np.exp(scores).sum()))
        return np.stack(rows)


def frames(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float32)[:, None]


def loss(network: Table, labels: tuple[int, ...], count: int) -> float:
    states, predictions = network.start("predictor"), []
    for label in (CLASSES - 1, *labels):
        predicted, states = network.predict(np.array([label]), states)
        predictions.append(predicted)
    scores = [
        network.log_probs(frame, np.concatenate(predictions), CLASSES) for frame in frames(count)
    ]
    targets = torch.tensor([labels], dtype=torch.int64).reshape(1, -1)
    sizes = torch.tensor([count]), torch.tensor([len(labels)])
    return float(
        transducer_loss(torch.tensor(np.stack(scores))[None], targets, *sizes, CLASSES - 1)
    )


@few
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_a_beam_without_bounds_gives_the_loss(seed: int, count: int) -> None:
    network, most = Table(seed), 2
    search = BeamSearch(network, CLASSES, 10**6, most)
    search.accept(frames(count))
    found = {prefix.labels: prefix.score for prefix in search.prefixes}
    assert len(found) == len(search.prefixes)  # none twice
    expected = {
        labels
        for length in range(most * count + 1)
        for labels in itertools.product(range(CLASSES - 1), repeat=length)
    }
    assert found.keys() == expected
    for labels, score in found.items():
        if len(labels) <= most:  # then no alignment is longer than a frame may be
            assert score == pytest.approx(-loss(network, labels, count), rel=1e-9)
    best = max(found, key=found.__getitem__)
    assert search.labels == list(best)


@few
@given(st.integers(0, 10**6), st.lists(st.integers(0, 2), max_size=3))
def test_chunks_do_not_matter(seed: int, parts: list[int]) -> None:
    whole, chunked = (BeamSearch(Table(seed), CLASSES, 3) for _ in range(2))
    whole.accept(frames(sum(parts)))
    left = frames(sum(parts))
    for part in parts:
        chunked.accept(left[:part])
        left = left[part:]
    assert [p.labels for p in whole.prefixes] == [p.labels for p in chunked.prefixes]
    assert [p.score for p in whole.prefixes] == [p.score for p in chunked.prefixes]


@few
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_prefixes_are_few_and_in_order(seed: int, width: int) -> None:
    search = BeamSearch(Table(seed), CLASSES, width)
    for frame in frames(4):
        search.accept(frame[None])
        scores = [prefix.score for prefix in search.prefixes]
        assert 1 <= len(scores) <= width
        assert scores == sorted(scores, reverse=True)


def test_equal_prefixes_are_summed() -> None:
    """A label is as likely in the first frame as in the second: together it beats none."""

    class Twice(Table):
        def log_probs(self, frame: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
            first = predicted[:, 0, 0] == classes  # nothing but the blank has been seen
            early = np.log([0.4, 1e-9, 0.6 - 1e-9])
            return np.where(first[:, None], early, np.log([1e-9, 1e-9, 1 - 2e-9]))

    greedy, beam = GreedySearch(Twice(0), CLASSES), BeamSearch(Twice(0), CLASSES, 2)
    for search in (greedy, beam):
        search.accept(frames(2))
    assert greedy.labels == []
    assert beam.labels == [0]
    assert np.exp(beam.prefixes[0].score) == pytest.approx(0.4 + 0.6 * 0.4, rel=1e-6)


def test_graphs_are_searched_as_well(rnnt: Path) -> None:
    network = Transducer(rnnt, threads=1)
    features = np.random.default_rng(0).standard_normal((4, 30)).astype(np.float32)
    encoded, _ = network.encode(features, network.start("encoder"))
    wide, narrow = (BeamSearch(network, CLASSES, width) for width in (16, 1))
    for search in (wide, narrow):
        search.accept(encoded)
    assert wide.prefixes[0].score >= narrow.prefixes[0].score
