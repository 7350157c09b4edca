"""From a float graph and feeds to the range of every activation, by all observers in one sweep.

Laws: the ranges do not depend on how the data is cut into batches, nor on the batches' order, bit
for bit; observations of two shares of the data, merged, equal the observation of all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import length_hint

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.clipping import OBSERVERS, clipping_range
from onnx_intq.feeds import Batch, check
from onnx_intq.graph import producer, require_float32, sole_consumer
from onnx_intq.grid import Grid
from onnx_intq.observe import Histogram
from onnx_intq.progress import Tick
from onnx_intq.ranges import Ranges
from onnx_intq.samples import Sampler, specs
from onnx_intq.segments import Segments
from onnx_intq.transform import IntqError

FUSED = {"Relu", "Clip"}
"""Operators that run inside the one before them, whose own result then never exists."""
GRIDS = {"": Grid(8, signed=False), "_symmetric": Grid(8, signed=True)}
"""The grids that ranges are searched for, by the suffix of the observer's name in the file."""


@dataclass
class Observation:
    """What was seen of every tensor, by name."""

    histograms: dict[str, Histogram] = field(default_factory=dict[str, Histogram])

    def merge(self, other: Observation) -> Observation:
        """The observation of both one's data together: associative and commutative."""
        names = sorted({*self.histograms, *other.histograms})
        empty = Histogram()
        return Observation(
            {n: self.histograms.get(n, empty).merge(other.histograms.get(n, empty)) for n in names}
        )

    def ranges(self, observer: str) -> Ranges:
        """The ranges of all tensors by all observers, of which `observer` is the chosen one.

        Raises:
            IntqError: There is no such observer.
        """
        return Ranges(
            observer=observer,
            tensors={
                name: {
                    key + suffix: clipping_range(histogram, key, grid)
                    for key in OBSERVERS
                    for suffix, grid in GRIDS.items()
                    if not suffix or key in {"entropy", "mse"}
                }
                for name, histogram in sorted(self.histograms.items())
                if histogram.count
            },
        )


def calibrate(
    graph: gs.Graph,
    feeds: Iterable[Batch],
    *,
    observer: str = "minmax",
    threads: int | None = None,
    progress: Tick | None = None,
) -> Ranges:
    """Run `feeds` through `graph` once and find every activation's range.

    Args:
        graph: A float32 graph; not changed.
        feeds: Batches, input name to array; of any lengths.
        observer: The method whose ranges are chosen: one of `clipping.OBSERVERS`. The result holds
            those of all.
        threads: Threads that compute one operator, None for all cores.
        progress: Called after each batch.

    Raises:
        IntqError: As for `observe`, or there is no such observer.
    """
    if observer not in OBSERVERS:
        raise IntqError(f"unknown observer {observer!r}; expected one of: {', '.join(OBSERVERS)}")
    return observe(graph, feeds, threads=threads, progress=progress).ranges(observer)


def observe(
    graph: gs.Graph,
    feeds: Iterable[Batch],
    *,
    threads: int | None = None,
    progress: Tick | None = None,
) -> Observation:
    """Run `feeds` through `graph` once and count every activation's values.

    Batches run sample by sample where the graph treats samples independently. Memory: 0.5 MiB for
    each tensor, and the activations of one sample in 32 consecutive tensors.

    Raises:
        IntqError: No feeds, or feeds that do not fit the inputs; NaN or infinity in a tensor; the
            graph is not float32.
    """
    require_float32(graph)
    names = observed(graph)
    found = {name: Histogram() for name in names}
    segments, sampler = Segments(graph, names, threads=threads), Sampler(graph, threads=threads)
    done = 0
    for done, batch in enumerate(feeds, start=1):
        check(batch, specs(graph))
        for sample in sampler.samples(batch):
            for name, values in segments.run(sample):
                found[name].update(values, name)
        if progress:
            progress(done, max(done, length_hint(feeds)))
    if not done:
        raise IntqError("the data holds no batch; expected at least one; check --data")
    return Observation(found)


def observed(graph: gs.Graph) -> list[str]:
    """The float32 activations of the graph itself that exist once operators are fused, in order.

    Tensors within the bodies of If, Loop and Scan are left out.
    """
    own = {id(node) for node in graph.nodes}
    made = [t for node in graph.nodes for t in node.outputs if not _fuses(graph, t, own)]
    return [t.name for t in [*graph.inputs, *made] if t.name and t.dtype == np.float32]


def _fuses(graph: gs.Graph, tensor: gs.Tensor, own: set[int]) -> bool:
    consumer = sole_consumer(graph, tensor)
    return (
        consumer is not None
        and id(consumer) in own
        and consumer.op in FUSED
        and consumer.inputs[0] is tensor
        and producer(tensor) is not None
    )
