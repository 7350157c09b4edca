"""What passes need and no pass gives: feeds, ranges, the float model; made when first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnx_intq.graph import metadata, with_metadata
from onnx_intq.source import Bar, Source
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class Supply:
    """Puts facts into a context, before the first pass that needs them.

    Attributes:
        source: Where feeds and ranges come from.
        original: The untouched model, which still has its BatchNorms; data is made for it.
        passes: The whole recipe.
        observer: Which of the calibrated ranges to use; None for the source's choice.
        bar: Makes a progress bar.
        lap: Told the name of every stage that ends.
    """

    source: Source
    original: gs.Graph
    passes: Sequence[Pass]
    observer: str | None
    bar: Bar
    lap: Callable[[str], None]

    def facts(self) -> set[str]:
        """The facts this can supply."""
        from_file = {"calibrated", "reference"}
        return from_file if self.source.ranges is not None else from_file | {"data"}

    def parts(self, held: set[str]) -> Iterator[Sequence[Pass]]:
        """The recipe, cut before every pass that needs a fact which does not hold by then."""
        start, held = 0, set(held)
        for index, spec in enumerate(self.passes):
            missing = self._wanted(spec) - held
            if missing and index > start:
                yield self.passes[start:index]
                start = index
            held |= missing | spec.gives
        yield self.passes[start:]

    def before(self, part: Sequence[Pass], graph: gs.Graph, ctx: Context) -> None:
        """Supply what the first pass of `part` needs.

        Raises:
            IntqError: The source is bad, or has no data.
        """
        wanted = self._wanted(part[0]) - ctx.facts if part else set()
        if "data" in wanted or ("calibrated" in wanted and self.source.ranges is None):
            self._give_data(graph, ctx)
        if "calibrated" in wanted:
            self._give_ranges(graph, ctx)

    def _wanted(self, spec: Pass) -> set[str]:
        """What a pass needs of this; who completes a model takes ranges where there are any."""
        uses = (
            {"calibrated"} if "complete" in spec.gives and not self.source.is_synthetic else set()
        )
        return {*(spec.needs & {"data", "calibrated"}), *uses}

    def _give_data(self, graph: gs.Graph, ctx: Context) -> None:
        if "data" in ctx.facts:
            return
        ctx.feeds = self.source.batches(self.original, metadata(graph), self.bar)
        ctx.facts.add("data")
        if self.source.is_synthetic:
            self.lap("synthesize")

    def _give_ranges(self, graph: gs.Graph, ctx: Context) -> None:
        found = self.source.ranges_of(graph, ctx.feeds, self.observer, self.bar)
        symmetric = any(getattr(p, "target", None) == "tensorrt" for p in self.passes)
        ctx.ranges = found.select(self.observer, symmetric=symmetric)
        ctx.reach = found.reach()
        if self.observer is None:
            ctx.alternatives = found.alternatives(symmetric=symmetric)
        metadata(graph)["onnx_intq.observer"] = self.observer or found.observer
        metadata(graph)["onnx_intq.ranges_sha256"] = found.sha256
        if any("reference" in p.needs for p in self.passes):
            ctx.reference = with_metadata(graph.copy(), graph)
        ctx.facts |= {"calibrated", "reference"}
        self.lap("calibrate")
