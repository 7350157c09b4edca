"""Feeds, the batches a model is run on: from `.npz` files, folders of them, or speech.

Laws: feeds may be read again and give the same batches; their memory does not grow with their
number; the shares of all ranks together are the feeds.
"""

from __future__ import annotations

import hashlib
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_intq import archive
from onnx_intq.archive import Batch as Batch
from onnx_intq.archive import write as write
from onnx_intq.frontend import Floats, Frontend
from onnx_intq.graph import sha256
from onnx_intq.manifest import Utterance, read_manifest
from onnx_intq.speech import features_of
from onnx_intq.transform import IntqError


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, dtype and shape of a model's input or output.

    Dimensions are sizes, names of dynamic sizes, or None; the shape is () for scalars and where the
    rank is unknown.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    @property
    def is_lengths(self) -> bool:
        """Whether this is one integer per element of the batch."""
        return self.dtype.kind == "i" and len(self.shape) == 1

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} [{', '.join(str(size or '?') for size in self.shape)}])"


SPEECH_INPUTS = (
    TensorSpec(
        name="audio_signal", dtype=np.dtype(np.float32), shape=("batch", "features", "time")
    ),
    TensorSpec(name="length", dtype=np.dtype(np.int64), shape=("batch",)),
)
"""The inputs of a speech model in NeMo's naming, where no model says otherwise."""


class Feeds(ABC):
    """Batches that can be counted, iterated over again and again, and shared among processes."""

    @abstractmethod
    def __len__(self) -> int:
        """How many batches there are."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """The batches, read one at a time."""

    @abstractmethod
    def share(self, rank: int, ranks: int) -> Feeds:
        """Every `ranks`-th batch, from number `rank` on."""


@dataclass(frozen=True, kw_only=True)
class ArchiveFeeds(Feeds):
    """Batches of `.npz` files."""

    entries: Sequence[archive.Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Batch]:
        return archive.batches(self.entries)

    def share(self, rank: int, ranks: int) -> ArchiveFeeds:
        """Every `ranks`-th batch, from number `rank` on."""
        return replace(self, entries=self.entries[rank::ranks])


@dataclass(frozen=True, kw_only=True)
class SpeechFeeds(Feeds):
    """Utterances, each a batch of one, as features and their length in frames."""

    utterances: Sequence[Utterance]
    frontend: Frontend
    inputs: Sequence[TensorSpec] = SPEECH_INPUTS

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[Batch]:
        for utterance in self.utterances:
            yield speech_batch([features_of(utterance, self.frontend)], self.inputs)

    def share(self, rank: int, ranks: int) -> SpeechFeeds:
        """Every `ranks`-th utterance, from number `rank` on."""
        return replace(self, utterances=self.utterances[rank::ranks])


def read(
    path: str | Path,
    *,
    frontend: Frontend | None = None,
    inputs: Sequence[TensorSpec] = SPEECH_INPUTS,
    limit: int | None = None,
) -> Feeds:
    """Find the batches of an `.npz` file, a folder of such files, a manifest or a folder of audio.

    Everything that can be checked without reading the data is checked now.

    Args:
        path: File or folder.
        frontend: Turns audio into features; needed for speech only.
        inputs: The model's inputs, which decide what is made of speech.
        limit: Take only this many batches or utterances, the first ones.

    Raises:
        IntqError: The data is missing, empty, or not of the form expected, or speech was given
            without a front end.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise IntqError(f"limit {limit}; expected at least 1; raise it or leave it out")
    if not path.exists():
        raise IntqError(
            f"{path}: no such file or folder; expected .npz, a manifest or a folder; check the path"
        )
    if archives := _archives(path):
        found = [entry for file in archives for entry in archive.entries(file)]
        archive.check_same_inputs(found)
        return ArchiveFeeds(entries=found[:limit])
    utterances = read_manifest(path)[:limit]
    if frontend is None:
        raise IntqError(
            f"{path}: is speech, and the model does not record its front end; give --frontend"
        )
    return SpeechFeeds(utterances=utterances, frontend=frontend, inputs=inputs)


def fingerprint(path: str | Path) -> str:
    """Hexadecimal SHA-256 of the data `read` finds at `path`; independent of where it lies.

    That of the file itself for one `.npz` file; otherwise that of the files' digests, in order, one
    per line; a manifest comes before the audio it names.

    Raises:
        IntqError: As for `read`.
    """
    path = Path(path)
    files = _archives(path)
    if not files:
        manifest = [path] if path.is_file() else []
        files = manifest + [utterance.audio for utterance in read_manifest(path)]
    if files == [path] and zipfile.is_zipfile(path):
        return sha256(path)
    return hashlib.sha256("".join(f"{sha256(file)}\n" for file in files).encode()).hexdigest()


def digest(batches: Sequence[Batch]) -> str:
    """Hexadecimal SHA-256 of batches in memory: names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for batch in batches:
        for name, values in sorted(batch.items()):
            found.update(f"{name} {values.dtype} {values.shape}\n".encode())
            found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()


def check(batch: Batch, inputs: Sequence[TensorSpec]) -> None:
    """Refuse a batch that a model with these inputs cannot take.

    Raises:
        IntqError: An input is missing or unexpected, or its dtype, rank or a fixed size differs.
    """
    expected = f"expected {', '.join(map(str, inputs))}"
    names = {spec.name for spec in inputs}
    if unexpected := sorted(set(batch) - names):
        raise IntqError(f"feeds hold {unexpected[0]!r}, which the model does not take; {expected}")
    for spec in inputs:
        if spec.name not in batch:
            raise IntqError(f"feeds lack input {spec.name!r}; {expected}")
        values = batch[spec.name]
        if values.dtype != spec.dtype:
            raise IntqError(f"input {spec.name!r} is {values.dtype}; {expected}; convert the feeds")
        if spec.shape and not _fits(values.shape, spec.shape):
            raise IntqError(
                f"input {spec.name!r} has shape {list(values.shape)}; {expected}; reshape the feeds"
            )


def speech_batch(
    features: Sequence[Floats], inputs: Sequence[TensorSpec]
) -> dict[str, npt.NDArray[Any]]:
    """Feeds of utterances: the model's float input gets features, its integer input their lengths.

    Args:
        features: float32 [mels, frames] per utterance; padded with zeros to the longest.
        inputs: The model's inputs: features [batch, mels, frames] and optionally lengths [batch].

    Raises:
        IntqError: The model has another input, or does not take these features.
    """
    lengths = np.array([each.shape[1] for each in features])
    signal = np.zeros((len(features), len(features[0]), max(lengths)), np.float32)
    for row, each in zip(signal, features, strict=True):
        row[:, : each.shape[1]] = each
    batch: dict[str, npt.NDArray[Any]] = {}
    for spec in inputs:
        if spec.dtype.kind == "f" and len(spec.shape) == signal.ndim:
            batch[spec.name] = signal
        elif spec.is_lengths:
            batch[spec.name] = lengths.astype(spec.dtype)
        else:
            raise IntqError(
                f"model takes {spec}; expected features, float32 [batch, mels, frames], or "
                "lengths, int64 [batch]; make feeds of your own, as .npz"
            )
    check(batch, inputs)
    return batch


def _archives(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.npz"))
    return [path] if path.suffix == ".npz" or zipfile.is_zipfile(path) else []


def _fits(shape: tuple[int, ...], expected: tuple[int | str | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        size == wanted
        for size, wanted in zip(shape, expected, strict=True)
        if isinstance(wanted, int)
    )
