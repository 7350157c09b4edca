"""What a model is trained on: samples of speech or of feeds, in batches of like lengths.

Law: batch number `step` depends on the samples, the seed and `step` alone; so training can be
resumed at any step, and every process of several knows the batch of which it takes a share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onnx_intq.archive import Batch as Feed
from onnx_intq.feeds import TensorSpec, speech_batch
from onnx_intq.frontend import Floats, Frontend
from onnx_intq.manifest import Utterance
from onnx_intq.speech import features_of
from onnx_intq.spelling import spell
from onnx_intq.transform import IntqError

Array = npt.NDArray[Any]
JITTER = 0.2
"""Utterances are sorted by their length times up to 1 + this, so that batches differ by epoch."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One utterance, or one row of feeds.

    Attributes:
        feed: One array per input, batch axis of size 1; of any size where feeds cannot be cut.
        frames: Valid frames, which decide what goes into a batch together.
        targets: Labels; None without transcript.
        joins: Whether it can be put into a batch with others.
    """

    feed: Feed
    frames: int
    targets: tuple[int, ...] | None = None
    joins: bool = True

    @property
    def rows(self) -> int:
        """How many utterances or rows it stands for."""
        return max((len(values) for values in self.feed.values() if values.ndim), default=1)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples side by side, padded with zeros to the longest of the whole batch.

    Attributes:
        feed: Tensors by input.
        frames: Valid input frames of each, int64 [batch].
        targets: Labels of each, int64 [labels]; empty without transcripts.
    """

    feed: dict[str, Tensor]
    frames: Tensor
    targets: tuple[Tensor, ...]


class Samples:
    """Samples that give the batch of every step.

    Args:
        samples: At least one.
        size: Samples per batch.
        seed: Of the order and of the crops.
        longest: Frames to which longer samples are cropped, at random places; None for no crops.
    """

    def __init__(
        self, samples: Sequence[Sample], size: int, seed: int, longest: int | None = None
    ) -> None:
        self.samples, self._size, self._seed, self._longest = samples, size, seed, longest
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    @cached_property
    def per_epoch(self) -> int:
        """Batches in which every sample comes once."""
        return len(self._grouped(np.zeros(len(self.samples))))

    def at(self, step: int) -> list[Sample]:
        """The samples of a training step, 0 or more."""
        epoch, index = divmod(step, self.per_epoch)
        if self._epoch[0] != epoch:
            random = np.random.default_rng([self._seed, epoch])
            groups = self._grouped(random.uniform(0, JITTER, len(self.samples)))
            order = random.permutation(len(groups))
            self._epoch = (epoch, [groups[i] for i in order])
        groups = self._epoch[1]
        return [self._cropped(n, step) for n in groups[index % len(groups)]]

    def in_order(self) -> Iterator[list[Sample]]:
        """All samples once, the shortest first, cropped from their beginnings."""
        for group in self._grouped(np.zeros(len(self.samples))):
            yield [crop(self.samples[n], 0, self._longest) for n in group]

    def _grouped(self, jitter: npt.NDArray[np.float64]) -> list[list[int]]:
        lengths = np.array([sample.frames for sample in self.samples]) * (1 + jitter)
        order = np.argsort(lengths, kind="stable")
        joining = [int(n) for n in order if self.samples[n].joins]
        # The number of batches must not depend on the jitter: all but the last are full.
        groups = [joining[i : i + self._size] for i in range(0, len(joining), self._size)]
        return groups + [[int(n)] for n in order if not self.samples[n].joins]

    def _cropped(self, number: int, step: int) -> Sample:
        sample = self.samples[number]
        if self._longest is None or sample.frames <= self._longest:
            return sample
        random = np.random.default_rng([self._seed, number, step])
        start = int(random.integers(sample.frames - self._longest + 1))
        return crop(sample, start, self._longest)


def crop(sample: Sample, start: int, longest: int | None) -> Sample:
    """At most `longest` frames of a sample, from `start` on."""
    if longest is None or sample.frames <= longest:
        return sample
    feed = {
        name: values[..., start : start + longest]
        if values.ndim > 1
        else np.full_like(values, longest)
        for name, values in sample.feed.items()
    }
    return replace(sample, feed=feed, frames=longest)


def speech_samples(
    utterances: Sequence[Utterance],
    frontend: Frontend,
    inputs: Sequence[TensorSpec],
    labels: Sequence[str] | None,
    progress: Callable[[int, int], object] | None = None,
) -> list[Sample]:
    """Features and labels of utterances.

    Args:
        utterances: From a manifest.
        frontend: Makes the features, of each whole utterance.
        inputs: What the model takes.
        labels: Without the blank; None where transcripts are not needed.
        progress: Called after each utterance.

    Raises:
        IntqError: Audio cannot be read, a transcript is missing or has no labels, or the model
            takes something else.
    """
    found = []
    for number, utterance in enumerate(utterances):
        targets = None if labels is None else _targets(utterance, labels)
        features = features_of(utterance, frontend)
        found.append(_speech_sample(features, inputs, targets))
        if progress:
            progress(number + 1, len(utterances))
    return found


def _speech_sample(
    features: Floats, inputs: Sequence[TensorSpec], targets: tuple[int, ...] | None
) -> Sample:
    feed = speech_batch([features], inputs)
    joins = all(not spec.shape or not isinstance(spec.shape[0], int) for spec in inputs)
    return Sample(feed=feed, frames=features.shape[1], targets=targets, joins=joins)


def _targets(utterance: Utterance, labels: Sequence[str]) -> tuple[int, ...]:
    if utterance.text is None:
        raise IntqError(
            f"{utterance.audio}: has no transcript; expected the key text in the manifest; add it, "
            "or train a model that is no RNN-T without, by --task 0"
        )
    try:
        return tuple(spell(utterance.text, labels))
    except IntqError as error:
        raise IntqError(f"{utterance.audio}: {error}") from error


def shared(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on, and those held out; one sample alone is both."""
    count = min(max(1, round(share * len(samples))), len(samples) - 1)
    if count < 1:
        return list(samples), list(samples)
    held = set(np.random.default_rng([seed, 1 << 16]).permutation(len(samples))[:count].tolist())
    kept = [sample for n, sample in enumerate(samples) if n not in held]
    return kept, [samples[n] for n in sorted(held)]


def collate(samples: Sequence[Sample], whole: Sequence[Sample], device: str) -> Batch:
    """Put samples side by side.

    Args:
        samples: At least one.
        whole: The batch they are a share of, whose longest they are padded to: what padding does
            to a model must not depend on how the batch is shared.
        device: Of torch.
    """
    feed = {
        name: torch.from_numpy(
            _joined([s.feed[name] for s in samples], [s.feed[name] for s in whole])
        )
        for name in samples[0].feed
    }
    targets = (torch.tensor(s.targets, dtype=torch.int64) for s in samples if s.targets is not None)
    frames = [sample.frames for sample in samples for _ in range(sample.rows)]
    return Batch(
        feed={name: tensor.to(device) for name, tensor in feed.items()},
        frames=torch.tensor(frames),
        targets=tuple(targets),
    )


def _joined(arrays: Sequence[Array], whole: Sequence[Array]) -> Array:
    """Arrays one after another, each padded to the largest of `whole`; a single one as it is."""
    if len(whole) == 1:
        return np.array(arrays[0])
    sizes = np.max([values.shape[1:] for values in whole], axis=0, initial=0).astype(int)
    joined = np.zeros((sum(map(len, arrays)), *sizes), arrays[0].dtype)
    start = 0
    for values in arrays:
        inner = tuple(slice(size) for size in values.shape[1:])
        joined[(slice(start, start + len(values)), *inner)] = values
        start += len(values)
    return joined
