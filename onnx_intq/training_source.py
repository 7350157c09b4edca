"""What a model is trained on, as the options of `train` name it, read into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_graphsurgeon as gs

from onnx_intq.feeds import TensorSpec, check, fingerprint, read
from onnx_intq.frontend import Frontend
from onnx_intq.graph import metadata
from onnx_intq.manifest import read_manifest
from onnx_intq.progress import Tick
from onnx_intq.samples import Sampler, specs
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY, labels_from_json
from onnx_intq.training_data import Sample, speech_samples
from onnx_intq.training_plan import Plan
from onnx_intq.transducer_objective import STATES
from onnx_intq.transform import IntqError


@dataclass(frozen=True, kw_only=True)
class TrainingSource:
    """Files and settings; one of `manifest` and `data` is given.

    Attributes:
        manifest: Speech.
        data: Feeds, as `synthesize` writes them.
        frontend: In place of what the model records.
        labels: The same, without the blank.

    Raises:
        IntqError: Both are given, or none.
    """

    manifest: Path | None = None
    data: Path | None = None
    frontend: Frontend | None = None
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if (self.manifest is None) == (self.data is None):
            found = "neither --manifest nor --data" if self.data is None else "both of them"
            raise IntqError(
                f"{found} given; expected --manifest with speech, or --data with feeds, which "
                "synthesize makes without any data; give one"
            )

    @property
    def path(self) -> Path:
        """The manifest or the feeds."""
        found = self.manifest or self.data
        assert found is not None  # noqa: S101 - one of them is given
        return found

    def fingerprint(self) -> str:
        """See `feeds.fingerprint`."""
        return fingerprint(self.path)

    def known_labels(self, graph: gs.Graph) -> Sequence[str]:
        """The labels, as given or recorded.

        Raises:
            IntqError: Neither.
        """
        return self.labels or labels_from_json(_recorded(metadata(graph), LABELS_KEY))

    def samples(
        self, graph: gs.Graph, plan: Plan, tick: Tick | None = None
    ) -> tuple[list[Sample], int]:
        """Read the data that the graph is fed, and count what is too long to be used.

        Args:
            graph: The model, of an RNN-T the encoder.
            plan: Whether transcripts are needed, and the longest utterance.
            tick: Called after each utterance.

        Raises:
            IntqError: The data cannot be read, does not suit the model, or nothing is left.
        """
        inputs = [spec for spec in specs(graph) if spec.name not in STATES]
        if self.data is not None:
            return _from_feeds(self.data, graph, inputs), 0
        known = self.frontend or Frontend.from_json(_recorded(metadata(graph), FRONTEND_KEY))
        found = speech_samples(
            read_manifest(self.path),
            known,
            inputs,
            self.known_labels(graph) if _reads_text(graph, plan) else None,
            tick,
        )
        longest = frames_in(plan.seconds, known)
        if not _reads_text(graph, plan):  # they are cropped
            return found, 0
        kept = [sample for sample in found if sample.frames <= longest]
        if not kept:
            raise IntqError(
                f"{self.path}: every utterance is longer than {plan.seconds:g} s; expected "
                "shorter ones; raise --seconds"
            )
        return kept, len(found) - len(kept)

    def longest(self, graph: gs.Graph, plan: Plan) -> int | None:
        """Frames that samples are cropped to; None where they are not."""
        if self.data is not None or _reads_text(graph, plan):
            return None
        known = self.frontend or Frontend.from_json(_recorded(metadata(graph), FRONTEND_KEY))
        return frames_in(plan.seconds, known)


def _reads_text(graph: gs.Graph, plan: Plan) -> bool:
    """Whether transcripts are needed: an RNN-T's predictor reads them, whatever the loss."""
    return bool(plan.task) or any(tensor.name in STATES for tensor in graph.inputs)


def frames_in(seconds: float, frontend: Frontend) -> int:
    """Frames of audio so long, at least one."""
    return max(1, int(seconds * frontend.sample_rate) // frontend.hop_length)


def _from_feeds(path: Path, graph: gs.Graph, inputs: Sequence[TensorSpec]) -> list[Sample]:
    sampler, found = Sampler(graph), list[Sample]()
    for batch in read(path, inputs=inputs):  # without a front end, speech is refused
        check(batch, inputs)
        for row in sampler.samples(batch):
            frames = max((v.shape[-1] for v in row.values() if v.ndim > 1), default=1)
            joins = all(len(v) == 1 for v in row.values() if v.ndim)
            whole = row is batch
            found.append(Sample(feed=row, frames=frames, joins=joins and not whole))
    return found


def _recorded(known: Mapping[str, str], key: str) -> str:
    if key not in known:
        option = key.rpartition(".")[2]
        raise IntqError(
            f"model does not record its {option} (metadata key {key}); expected a model made by "
            f"onnx-intq export; give --{option}"
        )
    return known[key]
