"""An RNN-T as a function from features to text, on whole utterances or in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from onnx_intq.beam_search import BeamSearch
from onnx_intq.frontend import Floats, Frontend
from onnx_intq.greedy_search import GreedySearch
from onnx_intq.recognizer import recorded_frontend, recorded_labels
from onnx_intq.speech import WORD_START
from onnx_intq.transducer import Transducer
from onnx_intq.transform import IntqError


class TransducerRecognizer:
    """The graphs of a folder, the front end they expect, the labels, and how to search.

    Laws: an utterance's text depends on no other; and in chunks it is that of the whole.

    Attributes:
        frontend: As given, or as the encoder records it.
        labels: The same; without the blank, which comes last.
        metadata: What the encoder records.
    """

    frontend: Frontend
    labels: tuple[str, ...]
    metadata: Mapping[str, str]

    def __init__(
        self,
        folder: str | Path,
        *,
        frontend: Frontend | None = None,
        labels: Sequence[str] | None = None,
        threads: int | None = None,
        beam: int | None = None,
        chunk: int | None = None,
    ) -> None:
        """Load the graphs.

        Args:
            folder: As `transducer_folder` describes it.
            frontend: In place of what the encoder records.
            labels: The same.
            threads: As for `runtime.Session`.
            beam: Width of the beam; None for greedy search.
            chunk: Frames of features that the encoder gets at once; None for all.

        Raises:
            IntqError: As for `Transducer`, or the front end or the labels are neither given nor
                recorded, or `beam` or `chunk` is out of range.
        """
        self._transducer = Transducer(folder, threads=threads)
        self.metadata = metadata = self._transducer.metadata
        self.frontend = frontend or recorded_frontend(metadata)
        self.labels = tuple(labels or recorded_labels(metadata))
        self._transducer.require_classes(len(self.labels) + 1)
        self._beam, self._chunk = beam, chunk
        if beam is not None and beam < 1:
            raise IntqError(f"beam of {beam}; expected at least 1; raise it")
        if chunk is not None:
            stack = self._transducer.stack(self.frontend.features)
            if chunk < 1 or chunk % stack:
                raise IntqError(
                    f"chunk of {chunk} frames; expected a multiple of {stack}, which the encoder "
                    "joins to one; change --chunk"
                )

    def transcribe(self, features: Sequence[Floats]) -> list[str]:
        """The transcript of each utterance.

        Args:
            features: float32 [mels, frames] per utterance, as `frontend` makes them.

        Raises:
            IntqError: The graphs do not fit each other or such features, give no scores for
                `labels`, or give NaN.
        """
        return [self._transcribe(each) for each in features]

    def _transcribe(self, features: Floats) -> str:
        classes = len(self.labels) + 1
        search: BeamSearch | GreedySearch
        if self._beam is None:
            search = GreedySearch(self._transducer, classes)
        else:
            search = BeamSearch(self._transducer, classes, self._beam)
        frames = features.shape[1]
        states = self._transducer.start("encoder")
        for start in range(0, frames, self._chunk or max(1, frames)):
            part = features[:, start : start + (self._chunk or frames)]
            encoded, states = self._transducer.encode(np.ascontiguousarray(part), states)
            search.accept(encoded)
        text = "".join(self.labels[label] for label in search.labels)
        return text.replace(WORD_START, " ")
