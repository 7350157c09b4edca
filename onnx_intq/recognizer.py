"""A CTC model as a function from features to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_intq.feeds import speech_batch
from onnx_intq.frontend import Floats, Frontend
from onnx_intq.real_io import RealSession
from onnx_intq.runtime import Model
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY, greedy, labels_from_json
from onnx_intq.transducer_folder import INPUTS
from onnx_intq.transform import IntqError

Outputs = Mapping[str, npt.NDArray[Any]]


class Recognizer:
    """An ONNX model with CTC outputs, the front end it expects and the labels it gives.

    Law: an utterance's text does not depend on the others in the batch. A model without a length
    input could not keep to it, so it gets utterances one by one.

    Attributes:
        frontend: As given, or as the model records it.
        labels: The same; without the blank, which comes last.
        metadata: What the model records.
    """

    frontend: Frontend
    labels: tuple[str, ...]
    metadata: Mapping[str, str]

    def __init__(
        self,
        model: Model,
        *,
        frontend: Frontend | None = None,
        labels: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        """Load the model.

        Raises:
            IntqError: As for `RealSession`, or the front end or the labels are neither given nor
                recorded, or are recorded wrongly, or the model is a part of an RNN-T.
        """
        self._session = RealSession(model, threads=threads)
        _require_whole(model, [spec.name for spec in self._session.inputs])
        self.metadata = metadata = self._session.metadata
        self.frontend = frontend or recorded_frontend(metadata)
        self.labels = tuple(labels or recorded_labels(metadata))
        self._takes_lengths = any(spec.is_lengths for spec in self._session.inputs)

    def transcribe(self, features: Sequence[Floats]) -> list[str]:
        """The greedy CTC transcript of each utterance.

        Args:
            features: float32 [mels, frames] per utterance, as `frontend` makes them.

        Raises:
            IntqError: The model does not take such features, gives no log-probabilities for
                `labels`, or gives NaN.
        """
        if self._takes_lengths:
            return self._transcribe_batch(features)
        return [text for each in features for text in self._transcribe_batch([each])]

    def _transcribe_batch(self, features: Sequence[Floats]) -> list[str]:
        outputs = self._session.run(speech_batch(features, self._session.inputs))
        log_probs = self._log_probs(outputs)
        frames = _encoded_lengths(outputs, log_probs, [each.shape[1] for each in features])
        return [greedy(row[:n], self.labels) for row, n in zip(log_probs, frames, strict=True)]

    def _log_probs(self, outputs: Outputs) -> npt.NDArray[Any]:
        classes = len(self.labels) + 1
        found = [v for v in outputs.values() if v.ndim == 3 and v.shape[2] == classes]
        if len(found) != 1:
            shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in outputs.items())
            raise IntqError(
                f"model gives {shapes}; expected one output [batch, frames, {classes}], "
                f"{classes - 1} labels and the blank; check --labels"
            )
        if np.isnan(found[0]).any():
            raise IntqError("model gives NaN as log-probabilities; expected numbers; check it")
        return found[0]


def _encoded_lengths(
    outputs: Outputs, log_probs: npt.NDArray[Any], lengths: Sequence[int]
) -> Sequence[int]:
    """Valid frames of each utterance: an output of the model, else input frames over the stride."""
    for values in outputs.values():
        if values.dtype.kind == "i" and values.shape == log_probs.shape[:1]:
            return [int(value) for value in values]
    stride = max(1, round(max(lengths) / log_probs.shape[1]))
    return [-(-length // stride) for length in lengths]


def _require_whole(model: Model, inputs: Sequence[str]) -> None:
    """Refuse the parts of an RNN-T."""
    for part, names in INPUTS.items():
        if set(inputs) == set(names):
            path = Path(model) if isinstance(model, str | Path) else Path("model")
            raise IntqError(
                f"{path}: is an RNN-T's {part}; expected a CTC model, or the folder of the RNN-T; "
                f"give {path.parent}"
            )


def recorded_frontend(metadata: Mapping[str, str]) -> Frontend:
    """The front end that a model's metadata holds.

    Raises:
        IntqError: They hold none, or an invalid one.
    """
    return Frontend.from_json(_recorded(metadata, FRONTEND_KEY))


def recorded_labels(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The labels, without the blank, that a model's metadata holds.

    Raises:
        IntqError: They hold none, or invalid ones.
    """
    return labels_from_json(_recorded(metadata, LABELS_KEY))


def _recorded(metadata: Mapping[str, str], key: str) -> str:
    if key not in metadata:
        option = key.rpartition(".")[2]
        raise IntqError(
            f"model does not record its {option} (metadata key {key}); expected a model made by "
            f"onnx-intq export; give --{option}"
        )
    return metadata[key]
