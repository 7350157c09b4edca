"""Feeds for an RNN-T's three graphs, made by running the float graphs on speech, or on noise.

From speech: each utterance is encoded in chunks, so that carried states are seen, and decoded
greedily; what went into the predictor and the joint on the way are their feeds. Without data: the
encoder gets smooth noise with mean 0 and deviation 1, as features with fixed normalization have;
the predictor random labels; the joint the two together.
Law: the same graphs and the same data or seed give the same feeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from onnx_intq.archive import write
from onnx_intq.feeds import Batch
from onnx_intq.frontend import Floats, Frontend
from onnx_intq.greedy_search import GreedySearch
from onnx_intq.manifest import Utterance, read_manifest
from onnx_intq.recognizer import recorded_frontend, recorded_labels
from onnx_intq.speech import features_of
from onnx_intq.transducer import States, Transducer, joined
from onnx_intq.transducer_folder import PARTS

CHUNK = 16
"""Frames of the encoder between two states that are seen: of what joins k frames to one, 16 k."""
UTTERANCES, FRAMES, LABELS = 12, 640, 24
"""What is made without data: utterances, their frames of features, and labels for the predictor."""
PAIRS = 8
"""Frames that the joint scores after each label."""
CORRELATION = 0.9
"""Of neighbouring frames and bands, see `latent`."""
Tick = Callable[[int, int], object]


class Recorder(Transducer):
    """A float transducer that keeps what its graphs are fed, one batch for each graph."""

    def __init__(self, folder: str | Path) -> None:
        """Load the graphs, as `Transducer` does."""
        super().__init__(folder)
        self.forget()

    def forget(self) -> None:
        """Begin an utterance."""
        self.chunks = list[Batch]()
        self._labels, self._states = list[npt.NDArray[np.int64]](), list[States]()
        self._pairs = list[tuple[Floats, Floats]]()

    def encode(self, features: Floats, states: States) -> tuple[Floats, States]:
        """As `Transducer.encode`."""
        self.chunks.append({"audio_signal": features[np.newaxis], **states.feeds()})
        return super().encode(features, states)

    def predict(self, labels: npt.NDArray[np.int64], states: States) -> tuple[Floats, States]:
        """As `Transducer.predict`."""
        self._labels.append(labels)
        self._states.append(states)
        return super().predict(labels, states)

    def log_probs(self, frame: Floats, predicted: Floats, classes: int) -> npt.NDArray[np.float64]:
        """As `Transducer.log_probs`, for a batch of one."""
        self._pairs.append((frame, predicted[0, 0]))
        return super().log_probs(frame, predicted, classes)

    def classes(self) -> int:
        """How many classes the joint scores, the blank included.

        Raises:
            IntqError: The encoder does not record the labels.
        """
        return len(recorded_labels(self.metadata)) + 1

    def features(self) -> int:
        """How many features a frame has, as the encoder records it."""
        return recorded_frontend(self.metadata).features

    def batches(self) -> dict[str, list[Batch]]:
        """The feeds of the utterance, by part."""
        sides = zip(*self._pairs, strict=True)
        encoded, predicted = (np.stack(side)[:, np.newaxis] for side in sides)
        labels = np.concatenate(self._labels)[:, np.newaxis]
        return {
            "encoder": self.chunks,
            "predictor": [{"label": labels, **joined(self._states).feeds()}],
            "joint": [{"encoded": encoded, "predicted": predicted}],
        }


@contextmanager
def recorded_feeds(
    folder: str | Path,
    data: str | Path | None = None,
    *,
    frontend: Frontend | None = None,
    seed: int = 0,
    progress: Tick | None = None,
) -> Iterator[dict[str, Path]]:
    """Folders of feeds by part, in a temporary place that is gone afterwards.

    Args:
        folder: A float RNN-T.
        data: A manifest or a folder of audio; None for noise.
        frontend: In place of what the encoder records.
        seed: Of the noise.
        progress: Called after each utterance.

    Raises:
        IntqError: As for `Transducer`; or the data cannot be read.
    """
    recorder = Recorder(folder)
    chunk = CHUNK * recorder.stack(recorder.features())
    plays: list[Callable[[], None]]
    if data is None:
        plays = [partial(_noise, recorder, chunk, seed + n) for n in range(UTTERANCES)]
    else:
        chosen = frontend or recorded_frontend(recorder.metadata)
        plays = [partial(_speech, recorder, chunk, chosen, u) for u in read_manifest(data)]
    with TemporaryDirectory(prefix="intq-feeds-") as place:
        paths = {part: Path(place) / part for part in PARTS}
        for path in paths.values():
            path.mkdir()
        for number, play in enumerate(plays):
            recorder.forget()
            play()
            for part, batches in recorder.batches().items():
                write(paths[part] / f"{number:06d}.npz", batches)
            if progress:
                progress(number + 1, len(plays))
        yield paths


def _speech(recorder: Recorder, chunk: int, frontend: Frontend, utterance: Utterance) -> None:
    """Decode an utterance greedily."""
    features = features_of(utterance, frontend)
    search = GreedySearch(recorder, recorder.classes())
    for encoded in _encoded(recorder, features, chunk):
        search.accept(encoded)


def _noise(recorder: Recorder, chunk: int, seed: int) -> None:
    """Encode noise, predict after random labels, and score random pairs of both."""
    random, classes = np.random.default_rng(seed), recorder.classes()
    features = smooth(random, (recorder.features(), FRAMES))
    frames = np.concatenate(list(_encoded(recorder, features, chunk)))
    states = recorder.start("predictor")
    for label in [classes - 1, *random.integers(classes - 1, size=LABELS)]:
        predicted, states = recorder.predict(np.array([label], np.int64), states)
        for frame in random.choice(frames, PAIRS):
            recorder.log_probs(frame, predicted, classes)


def _encoded(recorder: Recorder, features: Floats, chunk: int) -> Iterator[Floats]:
    states = recorder.start("encoder")
    for start in range(0, features.shape[1], chunk):
        part = np.ascontiguousarray(features[:, start : start + chunk])
        encoded, states = recorder.encode(part, states)
        yield encoded


def smooth(random: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Normal noise [features, frames] whose neighbours have `CORRELATION` along both axes."""
    noise = random.standard_normal(shape)
    for axis in range(2):
        rows = np.moveaxis(noise, axis, 0)
        for before, row in itertools.pairwise(rows):
            row *= math.sqrt(1 - CORRELATION**2)
            row += CORRELATION * before
    return noise.astype(np.float32)
