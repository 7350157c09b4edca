"""An RNN-T's three graphs as functions: encode a chunk, predict after a label, score what is next.

Graphs may be float, Q/DQ or integer-only: real values go in and come out (see `real_io`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_intq.feeds import TensorSpec
from onnx_intq.frontend import Floats
from onnx_intq.real_io import RealSession
from onnx_intq.transducer_folder import part_paths, require_inputs
from onnx_intq.transform import IntqError

LONGEST_STACK = 64
"""Most frames that an encoder may join to one."""


@dataclass(frozen=True, kw_only=True)
class States:
    """Hidden and cell states of LSTM layers, float32 [layers, batch, width] each."""

    h: Floats
    c: Floats

    def feeds(self) -> dict[str, npt.NDArray[Any]]:
        """As inputs of a graph."""
        return {"h": self.h, "c": self.c}

    def row(self, number: int) -> States:
        """Those of one element of the batch."""
        chosen = slice(number, number + 1)
        return States(h=self.h[:, chosen], c=self.c[:, chosen])


def joined(states: list[States]) -> States:
    """The states of several elements as those of a batch."""
    h, c = (np.concatenate([getattr(s, name) for s in states], axis=1) for name in ("h", "c"))
    return States(h=h, c=c)


class Transducer:
    """The graphs of a folder, loaded.

    Attributes:
        metadata: What the encoder records.
    """

    metadata: Mapping[str, str]

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        """Load the graphs.

        Args:
            folder: As `transducer_folder` describes it.
            threads: As for `runtime.Session`.

        Raises:
            IntqError: A file is missing, is no model, or takes other inputs than its part should.
        """
        self.folder = Path(folder)
        paths = part_paths(folder)
        self._parts = {name: RealSession(path, threads=threads) for name, path in paths.items()}
        self.metadata = self._parts["encoder"].metadata
        for name, session in self._parts.items():
            require_inputs(name, paths[name], (spec.name for spec in session.inputs))

    def start(self, part: str) -> States:
        """Zero states of the encoder or the predictor, for a batch of one.

        Raises:
            IntqError: The graph does not say how large its states are.
        """
        specs = {spec.name: spec for spec in self._parts[part].inputs}
        return States(h=self._zeros(part, specs["h"]), c=self._zeros(part, specs["c"]))

    def _zeros(self, part: str, state: TensorSpec) -> Floats:
        match state.shape:
            case (int(layers), _, int(width)):
                return np.zeros((layers, 1, width), np.float32)
        raise IntqError(
            f"{self.folder / part}.onnx: takes {state}; expected states [layers, batch, width], "
            "numbers but for the batch; export the RNN-T again"
        )

    def encode(self, features: Floats, states: States) -> tuple[Floats, States]:
        """Encode a chunk of one utterance.

        Args:
            features: float32 [mels, frames].
            states: Those after the chunk before.

        Returns:
            Float32 [frames', width] and the states after it.
        """
        feeds = {"audio_signal": features[np.newaxis], **states.feeds()}
        encoded, after = self._step("encoder", feeds, "encoded")
        return encoded[0], after

    def predict(self, labels: npt.NDArray[np.int64], states: States) -> tuple[Floats, States]:
        """Take in one label [batch] each; returns float32 [batch, 1, width] and the states."""
        return self._step(
            "predictor", {"label": labels[:, np.newaxis], **states.feeds()}, "predicted"
        )

    def require_classes(self, classes: int) -> None:
        """Refuse a joint that is known to give scores of another number of classes.

        Raises:
            IntqError: It does.
        """
        shapes = {spec.name: spec.shape for spec in self._parts["joint"].outputs}
        match shapes.get("logits"):
            case (*_, int(last)) as shape if last != classes:
                raise self._other_classes(shape, classes)

    def _other_classes(self, shape: Sequence[object], classes: int) -> IntqError:
        sizes = ", ".join(map(str, shape))
        return IntqError(
            f"{self.folder / 'joint.onnx'}: gives logits [{sizes}]; expected "
            f"[batch, T, U, {classes}], {classes - 1} labels and the blank; check --labels"
        )

    def log_probs(self, frame: Floats, predicted: Floats, classes: int) -> npt.NDArray[np.float64]:
        """Score what may come next.

        Args:
            frame: Of the encoder, float32 [width].
            predicted: float32 [batch, 1, width].
            classes: How many there must be, with the blank.

        Returns:
            Log-probabilities, float64 [batch, classes].

        Raises:
            IntqError: There are other classes, or scores are NaN.
        """
        encoded = np.broadcast_to(frame, (len(predicted), 1, len(frame)))
        feeds = {"encoded": np.ascontiguousarray(encoded), "predicted": predicted}
        logits = self._parts["joint"].run(feeds, ["logits"])["logits"]
        if logits.shape != (len(predicted), 1, 1, classes):
            raise self._other_classes(logits.shape, classes)
        scores = logits[:, 0, 0].astype(np.float64)
        if np.isnan(scores).any():
            raise IntqError(f"{self.folder}: gives NaN as scores; expected numbers; check it")
        scores -= scores.max(axis=1, keepdims=True)
        found: npt.NDArray[np.float64] = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return found

    def stack(self, mels: int) -> int:
        """How many frames, of so many mel bands, the encoder joins to one.

        Raises:
            IntqError: More than `LONGEST_STACK`, or it takes no such frames.
        """
        states = self.start("encoder")
        for frames in range(1, LONGEST_STACK + 1):
            silence = np.zeros((mels, frames + 1), np.float32)
            if len(self.encode(silence, states)[0]) > 1:
                return frames
        raise IntqError(
            f"{self.folder}: its encoder joins more than {LONGEST_STACK} frames to one; expected "
            "fewer, to work in chunks; leave out --chunk"
        )

    def _step(
        self, part: str, feeds: dict[str, npt.NDArray[Any]], result: str
    ) -> tuple[Floats, States]:
        outputs = self._parts[part].run(feeds, [result, "h_out", "c_out"])
        return outputs[result], States(h=outputs["h_out"], c=outputs["c_out"])
