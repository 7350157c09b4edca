"""Beam search over the labels of an RNN-T, frame by frame.

Source: Graves, "Sequence Transduction with Recurrent Neural Networks", arXiv:1211.3711, section
2.6, with a bound on the labels per frame as in the time-synchronous decoding of Saon et al.,
"Alignment-Length Synchronous Decoding for RNN Transducer", ICASSP 2020, section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_intq.frontend import Floats
from onnx_intq.greedy_search import MOST
from onnx_intq.transducer import States, Transducer, joined

NEGLIGIBLE = 7.0
"""Nats below the worst prefix of a beam at which ways are given up: they would add 0.1 % to it."""


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Labels written so far.

    Attributes:
        labels: Their numbers.
        score: Log-probability of all their alignments with the frames so far that were followed.
        predicted: What the predictor gives after them, float32 [1, 1, width].
        states: Of the predictor after them.
    """

    labels: tuple[int, ...]
    score: float
    predicted: Floats
    states: States


class BeamSearch:
    """Takes in frames as they come and keeps the best prefixes.

    Laws: no prefix is kept twice, the alignments of equal ones are summed; and if `width` and
    `most` are so large that nothing is left out, the score is minus the RNN-T loss.

    Attributes:
        prefixes: At most `width`, the best first.
    """

    prefixes: list[Prefix]

    def __init__(self, transducer: Transducer, classes: int, width: int, most: int = MOST) -> None:
        """Start an utterance.

        Args:
            transducer: The network.
            classes: With the blank, which is the last.
            width: Prefixes that are kept.
            most: Labels that may be written at one frame.

        Raises:
            IntqError: As for `Transducer.predict`.
        """
        self._transducer, self._blank = transducer, classes - 1
        self._width, self._most = width, most
        start = Prefix(
            labels=(),
            score=0.0,
            predicted=np.zeros(0, np.float32),
            states=transducer.start("predictor"),
        )
        self.prefixes = self._predicted([(start, self._blank, 0.0)], write=False)

    @property
    def labels(self) -> list[int]:
        """Numbers of the labels of the best prefix."""
        return list(self.prefixes[0].labels)

    def accept(self, encoded: Floats) -> None:
        """Take in frames of the encoder, float32 [frames, width]."""
        for frame in encoded:
            self.prefixes = self._after(frame)

    def _after(self, frame: Floats) -> list[Prefix]:
        ended: dict[tuple[int, ...], Prefix] = {}
        going, left = self.prefixes, self._most
        while True:
            scores = self._scores(frame, going)
            for prefix, score in zip(going, scores[:, self._blank], strict=True):
                _merge(ended, prefix, float(score))
            longer = self._longer(going, scores)
            if not left or self._is_hopeless(longer, ended):
                return _best(ended.values(), self._width)
            going, left = self._predicted(longer, write=True), left - 1

    def _is_hopeless(
        self, longer: list[tuple[Prefix, int, float]], ended: dict[tuple[int, ...], Prefix]
    ) -> bool:
        """Whether the best of the longer ones, which get worse only, adds nothing to a beam."""
        full = _best(ended.values(), self._width)
        return len(full) == self._width and longer[0][2] < full[-1].score - NEGLIGIBLE

    def _scores(self, frame: Floats, prefixes: list[Prefix]) -> npt.NDArray[np.float64]:
        """Log-probabilities of all classes after each prefix, its own score included."""
        predicted = np.concatenate([prefix.predicted for prefix in prefixes])
        next_label = self._transducer.log_probs(frame, predicted, self._blank + 1)
        own = np.array([[prefix.score] for prefix in prefixes], np.float64)
        return np.add(next_label, own)

    def _longer(
        self, prefixes: list[Prefix], scores: npt.NDArray[np.float64]
    ) -> list[tuple[Prefix, int, float]]:
        """The best ways to write one label more: prefix, label and score, the best first."""
        order = np.argsort(-scores[:, : self._blank], axis=None, kind="stable")[: self._width]
        places = zip(*np.unravel_index(order, (len(prefixes), self._blank)), strict=True)
        return [(prefixes[row], int(label), float(scores[row, label])) for row, label in places]

    def _predicted(self, longer: list[tuple[Prefix, int, float]], *, write: bool) -> list[Prefix]:
        """Prefixes with a label more, which the predictor takes in for all at once."""
        labels = np.array([label for _, label, _ in longer], np.int64)
        states = joined([prefix.states for prefix, _, _ in longer])
        predicted, after = self._transducer.predict(labels, states)
        return [
            Prefix(
                labels=(*prefix.labels, label) if write else prefix.labels,
                score=score,
                predicted=predicted[row : row + 1],
                states=after.row(row),
            )
            for row, (prefix, label, score) in enumerate(longer)
        ]


def _merge(ended: dict[tuple[int, ...], Prefix], prefix: Prefix, score: float) -> None:
    """Add a way to a prefix to the others."""
    known = ended.get(prefix.labels)
    total = score if known is None else float(np.logaddexp(known.score, score))
    ended[prefix.labels] = Prefix(
        labels=prefix.labels, score=total, predicted=prefix.predicted, states=prefix.states
    )


def _best(prefixes: Iterable[Prefix], width: int) -> list[Prefix]:
    return sorted(prefixes, key=lambda prefix: -prefix.score)[:width]
