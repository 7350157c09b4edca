"""Cuts batches into samples, so that results do not depend on how data was put into batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.feeds import Batch, TensorSpec
from onnx_intq.segments import Segments

TOLERANCE = 1e-3
"""Relative to a tensor's largest value: far above float32 rounding, far below another sample."""


class Sampler:
    """Cuts batches where all inputs share a dynamic first axis that the model does not mix along.

    Shapes alone cannot tell: a dynamic first axis may be time, along which a recurrent layer or a
    normalization mixes. So the first batch is tried both ways.
    """

    def __init__(self, graph: gs.Graph, *, threads: int | None = None) -> None:
        """Prepare for batches of `graph`, which is not changed; `threads` as in `Segments`."""
        self._graph = graph
        self._threads = threads
        self._independent: bool | None = None
        if not all(t.shape and not isinstance(t.shape[0], int) for t in graph.inputs):
            self._independent = False

    def samples(self, batch: Batch) -> Iterator[Batch]:
        """The samples of `batch`, each a batch of one, or `batch` itself where it cannot be cut."""
        sizes = {len(values) if values.ndim else 0 for values in batch.values()}
        if self._independent is False or len(sizes) != 1 or min(sizes) < 2:
            yield batch
            return
        if self._independent is None:
            self._independent = self._is_independent(_rows(batch, 0, 2))
        if not self._independent:
            yield batch
            return
        for index in range(*sizes):
            yield _rows(batch, index, index + 1)

    def _is_independent(self, pair: Batch) -> bool:
        """Whether two samples get the same results together and each alone."""
        outputs = [t.name for t in self._graph.outputs]
        segments = Segments(self._graph, outputs, threads=self._threads)
        together = dict(segments.run(pair))
        return all(
            _close(values, together[name][index : index + 1])
            for index in range(2)
            for name, values in segments.run(_rows(pair, index, index + 1))
        )


def specs(graph: gs.Graph) -> list[TensorSpec]:
    """What the graph takes, as `feeds.check` wants it."""
    return [
        TensorSpec(name=t.name, dtype=np.dtype(t.dtype), shape=tuple(t.shape or ()))
        for t in graph.inputs
    ]


def _rows(batch: Batch, start: int, end: int) -> Batch:
    return {name: values[start:end] for name, values in batch.items()}


def _close(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    if a.shape != b.shape:
        return False
    reach = np.abs(b.astype(np.float64)).max(initial=0.0)
    if not np.isfinite(reach):  # calibration names the tensor that is to blame
        return True
    return bool(np.allclose(a, b, rtol=0.0, atol=TOLERANCE * reach))
