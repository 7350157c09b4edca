"""Latency of engines on the GPU, by its own clock, engines in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.engine_file import Sidecar, load_session
from onnx_intq.engine_layers import read_layers
from onnx_intq.engine_profile import with_batch
from onnx_intq.engine_session import EngineSession
from onnx_intq.feeds import Batch
from onnx_intq.graph import metadata
from onnx_intq.runtime import Timing, timings
from onnx_intq.shapes import input_shapes
from onnx_intq.transform import IntqError
from onnx_intq.verify import random_feeds

WARM_UP = 10
"""Runs before those that count: clocks rise, memory is touched."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Latency of one engine at one batch size.

    Attributes:
        engine: Its file.
        batch: Utterances per run.
        int8: Convolutions and matrix products in int8; None where neither the sidecar nor the
            engine tells.
        products: All of them.
        alone: Q/DQ nodes that were not fused; None without a sidecar.
        timing: Seconds per run; `ratio` is to the first engine at this batch size.
    """

    engine: str
    batch: int
    int8: int | None
    products: int | None
    alone: int | None
    timing: Timing


def latency(
    files: Sequence[Path],
    *,
    seconds: float,
    batches: Sequence[int] = (1,),
    rounds: int = 20,
    graph: bool = False,
) -> list[Row]:
    """Time engines in turn, A B A B ..., on the same numbers.

    Args:
        files: At least one engine.
        seconds: Of audio in the input, where the engine leaves its length open.
        batches: Utterances per run, where the engine leaves them open.
        rounds: Timed runs of each, after `WARM_UP` of each.
        graph: Whether to replay CUDA graphs in place of queueing every kernel.

    Raises:
        IntqError: As for `load_session`; or an engine was not built for such shapes.
    """
    loaded = [load_session(file) for file in files]
    rows = []
    for batch in batches:
        turns = [
            session.timer(feeds(session, sidecar, seconds=seconds, batch=batch), graph=graph)
            for session, sidecar in loaded
        ]
        for file, (session, sidecar), timing in zip(
            files, loaded, _time(turns, rounds), strict=True
        ):
            rows.append(_row(file, batch, session, sidecar, timing))
    return rows


def feeds(session: EngineSession, sidecar: Sidecar | None, *, seconds: float, batch: int) -> Batch:
    """Random feeds of `seconds` of audio for an engine."""
    axes = sidecar.axes if sidecar else {}
    inputs = [
        gs.Variable(s.name, s.dtype, list(axes.get(s.name) or _named(s.name, s.shape)))
        for s in session.inputs
    ]
    graph = gs.Graph(inputs=inputs)
    metadata(graph).update(session.metadata)
    shapes = input_shapes(graph, seconds=seconds)
    return random_feeds(graph, with_batch(graph, shapes, batch))


def _named(name: str, shape: Sequence[int | str | None]) -> list[int | str]:
    """A shape with names for its dynamic axes; the first is the batch of all inputs."""
    names = (f"{name}_{axis}" if axis else "batch" for axis in range(len(shape)))
    return [s if isinstance(s, int) else n for s, n in zip(shape, names, strict=True)]


def _time(turns: Sequence[Callable[[], float]], rounds: int) -> Iterator[Timing]:
    if rounds < 1:
        raise IntqError(f"{rounds} rounds of timing; expected at least 1; raise the number")
    for _ in range(WARM_UP):
        for turn in turns:
            turn()
    times = np.array([[turn() for turn in turns] for _ in range(rounds)])
    yield from timings(times)


def _row(
    file: Path, batch: int, session: EngineSession, sidecar: Sidecar | None, timing: Timing
) -> Row:
    if sidecar is not None:
        types = [product.precision for product in sidecar.products]
    else:
        kernels = read_layers(session.describe())
        types = [layer.inputs[0] for layer in kernels if layer.multiplies and layer.inputs]
    return Row(
        engine=str(file),
        batch=batch,
        int8=types.count("int8") if types else None,
        products=len(types) or None,
        alone=len(sidecar.alone) if sidecar else None,
        timing=timing,
    )
