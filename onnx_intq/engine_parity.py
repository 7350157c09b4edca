"""Compares an engine's outputs with those of its ONNX file, and with itself on padded input.

An engine hands out no inner tensors: what `compare` says of layers, it cannot say here. Padding is
looked at because engines have failed there: QuartzNet in NeMo's pull request 2314 had 7.34 % errors
in ONNX and 9.08 % in TensorRT, for want of masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnx_intq.feeds import Batch, TensorSpec
from onnx_intq.progress import Tick
from onnx_intq.transform import IntqError

Arrays = Mapping[str, npt.NDArray[Any]]
PADDING = 1.25
"""How many times longer the padded input is."""


class Runner(Protocol):
    """A model that runs: an engine's session, or onnxruntime's."""

    inputs: tuple[TensorSpec, ...]

    def run(self, feeds: Batch) -> Arrays:
        """Run it once."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """How far an output of the engine is from that of the ONNX file, over all batches.

    Attributes:
        name: Of the output.
        sqnr: Signal to noise, decibels; infinite where both are equal.
        largest: Largest difference.
        agree: Percent of positions along the last axis with the same largest entry: for
            log-probabilities, frames with the same label. None for outputs of one axis.
    """

    name: str
    sqnr: float
    largest: float
    agree: float | None


@dataclass(frozen=True, kw_only=True)
class Parity:
    """An engine against its ONNX file.

    Attributes:
        batches: How many were run.
        outputs: One per output.
        padded: Largest difference of the engine's float outputs, on the frames that count, when
            silence is appended to its input and the lengths stay; None without lengths, or where
            the engine takes nothing longer.
    """

    batches: int
    outputs: tuple[Output, ...]
    padded: float | None


def parity(
    reference: Runner,
    engine: Runner,
    batches: Iterable[Batch],
    *,
    largest: Mapping[str, Sequence[int]] | None = None,
    progress: Tick | None = None,
) -> Parity:
    """Run both on the same batches.

    Args:
        reference: The ONNX file.
        engine: Its engine.
        batches: At least one, of shapes the engine was built for.
        largest: Input -> the largest shape the engine takes: batches are padded no further. An
            input that is left out takes any.
        progress: Called after each batch with how many are done.

    Raises:
        IntqError: There is no batch, the outputs differ in name or shape, or running fails.
    """
    sums: dict[str, _Sum] = {}
    padded: list[float] = []
    done = 0
    for done, batch in enumerate(batches, start=1):
        expected, found = reference.run(batch), engine.run(batch)
        _check(expected, found)
        for name, values in expected.items():
            sums.setdefault(name, _Sum()).add(values, found[name])
        if any(spec.is_lengths for spec in engine.inputs):
            padded += _padded(engine, batch, found, largest or {})
        if progress:
            progress(done, done)
    if not done:
        raise IntqError("the data holds no batch; expected at least one; check --data")
    return Parity(
        batches=done,
        outputs=tuple(total.output(name) for name, total in sums.items()),
        padded=max(padded, default=None),
    )


@dataclass
class _Sum:
    """The errors of one output so far."""

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    same: int = 0
    positions: int = 0

    def add(self, expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> None:
        reference = expected.astype(np.float64)
        error = np.abs(found.astype(np.float64) - reference)
        self.signal += float(np.square(reference).sum())
        self.noise += float(np.square(error).sum())
        self.largest = max(self.largest, float(error.max(initial=0.0)))
        if expected.ndim > 1:
            same = expected.argmax(axis=-1) == found.argmax(axis=-1)
            self.same += int(same.sum())
            self.positions += same.size

    def output(self, name: str) -> Output:
        with np.errstate(divide="ignore"):
            sqnr = 10 * float(np.log10(self.signal / self.noise)) if self.noise else np.inf
        agree = 100 * self.same / self.positions if self.positions else None
        return Output(name=name, sqnr=sqnr, largest=self.largest, agree=agree)


def _check(expected: Arrays, found: Arrays) -> None:
    a, b = (
        ", ".join(f"{name} {list(values.shape)}" for name, values in each.items())
        for each in (expected, found)
    )
    if {n: v.shape for n, v in expected.items()} != {n: v.shape for n, v in found.items()}:
        raise IntqError(
            f"the model gives {a}, the engine {b}; expected the same outputs; compare an engine "
            "with the model it was built of"
        )


def _padded(
    engine: Runner, batch: Batch, alone: Arrays, largest: Mapping[str, Sequence[int]]
) -> list[float]:
    """The largest difference that zeros behind the last axis make to what was there before.

    Empty where there is no room for zeros.
    """
    feeds = {s.name: _longer(batch[s.name], s, largest.get(s.name)) for s in engine.inputs}
    if all(values.size == batch[name].size for name, values in feeds.items()):
        return []
    longer = engine.run(feeds)
    differences = (
        np.abs(longer[name][_part(values.shape)] - values).max(initial=0.0)
        for name, values in alone.items()
        if values.dtype.kind == "f"
    )
    return [float(max(differences, default=0.0))]


def _longer(
    values: npt.NDArray[Any], spec: TensorSpec, largest: Sequence[int] | None
) -> npt.NDArray[Any]:
    if spec.is_lengths or values.ndim < 2:
        return values
    size = values.shape[-1]
    wanted = math.ceil(PADDING * size)
    wanted = min(wanted, largest[-1]) if largest else wanted
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, wanted - size)])


def _part(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in shape)
