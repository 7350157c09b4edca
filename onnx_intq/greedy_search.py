"""Greedy decoding of an RNN-T: at each frame the best label, again and again, until the blank."""

from __future__ import annotations

import numpy as np

from onnx_intq.frontend import Floats
from onnx_intq.transducer import Transducer

MOST = 10
"""Labels that may be written at one frame."""


class GreedySearch:
    """Takes in frames as they come and keeps the labels written so far.

    Law: the labels do not depend on how the frames are cut into chunks.

    Attributes:
        labels: Numbers of the labels written.
    """

    labels: list[int]

    def __init__(self, transducer: Transducer, classes: int, most: int = MOST) -> None:
        """Start an utterance.

        Args:
            transducer: The network.
            classes: With the blank, which is the last.
            most: Labels that may be written at one frame.

        Raises:
            IntqError: As for `Transducer.predict`.
        """
        self._transducer, self._classes, self._most = transducer, classes, most
        self.labels = []
        self._states = transducer.start("predictor")
        self._predict(classes - 1)

    def accept(self, encoded: Floats) -> None:
        """Take in frames of the encoder, float32 [frames, width]."""
        for frame in encoded:
            for _ in range(self._most):
                scores = self._transducer.log_probs(frame, self._predicted, self._classes)
                best = int(scores[0].argmax())
                if best == self._classes - 1:
                    break
                self.labels.append(best)
                self._predict(best)

    def _predict(self, label: int) -> None:
        labels = np.array([label], np.int64)
        self._predicted, self._states = self._transducer.predict(labels, self._states)
