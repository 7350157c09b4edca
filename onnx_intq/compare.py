"""Compares two models tensor by tensor, and says which layer the error between them enters at.

Free-running, both compute everything from the same feeds: errors add up along the way.
Teacher-forced, every layer of B reads what A computed, on B's grids: its error is its own.
Law: a model compared with itself is exact in every tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import length_hint

import onnx_graphsurgeon as gs

from onnx_intq.compare_layers import CutGraph, Part, layer
from onnx_intq.compare_tensors import Array, Reading, View, counterpart, view
from onnx_intq.comparison import Comparison, Row
from onnx_intq.feeds import Batch, TensorSpec, check
from onnx_intq.progress import Tick
from onnx_intq.segments import Segments
from onnx_intq.transform import IntqError
from onnx_intq.verify import small_feeds

SIZE = 32
"""Layers of B that run together."""


def compare(
    a: gs.Graph,
    b: gs.Graph,
    feeds: Iterable[Batch],
    *,
    threads: int | None = None,
    progress: Tick | None = None,
) -> Comparison:
    """Compare B with A on every tensor that both have.

    Memory: A once, B twice, and the activations of one batch in some hundred consecutive tensors.

    Args:
        a: A float, QDQ or integer-only graph as `graph.load` gives it: the reference. Not changed.
        b: Another with the same inputs. Not changed.
        feeds: Batches for `inputs(a, b)`.
        threads: Threads per operator, None for all processors.
        progress: Called after each batch.

    Raises:
        IntqError: The inputs differ, no tensor is in both, a value is NaN, there are no feeds or
            they do not fit, or onnxruntime refuses a model.
    """
    views = view(a), view(b)
    specs = _signature(*views)
    batches = iter(feeds)
    first = list(islice(batches, 1))
    if not first:
        raise IntqError("the data holds no batch; expected at least one; check --data")
    check(first[0], specs)
    run = _Run(*views, first[0], threads)
    done = 0
    for done, batch in enumerate(chain(first, batches), start=1):
        check(batch, specs)
        run.add(batch)
        if progress:
            progress(done, max(done, length_hint(feeds)))
    kinds = (views[0].kind, views[1].kind)
    return Comparison(kinds=kinds, batches=done, rows=run.rows, left_out=run.left_out)


def inputs(a: gs.Graph, b: gs.Graph) -> tuple[TensorSpec, ...]:
    """What both graphs take; float inputs in real units, even where a model takes integers.

    Raises:
        IntqError: They take different things.
    """
    return _signature(view(a), view(b))


def random_feeds(specs: Sequence[TensorSpec]) -> Batch:
    """Small feeds of random numbers for these inputs: one sample of 256 frames."""
    tensors = [gs.Variable(spec.name, spec.dtype, list(spec.shape)) for spec in specs]
    return small_feeds(gs.Graph(inputs=tensors))


def _signature(a: View, b: View) -> tuple[TensorSpec, ...]:
    known, other = ({spec.name: spec for spec in each.inputs} for each in (a, b))
    if known.keys() != other.keys() or not all(_agree(known[n], other[n]) for n in known):
        raise IntqError(
            f"A takes {', '.join(map(str, a.inputs))}, B {', '.join(map(str, b.inputs))}; "
            "expected the same inputs; compare two forms of one model"
        )
    return a.inputs


def _agree(a: TensorSpec, b: TensorSpec) -> bool:
    sizes = zip(a.shape, b.shape, strict=False)
    return a.dtype == b.dtype and not any(
        isinstance(x, int) and isinstance(y, int) and x != y for x, y in sizes
    )


@dataclass(frozen=True)
class _Pair:
    """A tensor both models have: how A holds it, and how B does."""

    a: Reading
    b: Reading


@dataclass(frozen=True)
class _Group:
    """Rows whose layers run together, and the tensors of A that no later group reads."""

    rows: Sequence[Row]
    part: Part
    last: set[str]


class _Stream:
    """The tensors of one run, by name; those made before the one asked for are held."""

    def __init__(self, made: Iterator[tuple[str, Array]]) -> None:
        self._made = made
        self._held: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        while name not in self._held:
            found, values = next(self._made)
            self._held[found] = values
        return self._held[name]

    def pop(self, name: str) -> Array:
        values = self[name]
        del self._held[name]
        return values


class _Run:
    """Both models, loaded, and the errors so far.

    Attributes:
        rows: One per shared tensor that B computes.
        left_out: (tensor, reason) for those whose shapes differ.
    """

    def __init__(self, a: View, b: View, first: Batch, threads: int | None) -> None:
        self._a, self._b = a, b
        pairs = _pairs(a, b)
        self._free_a = Segments(a.graph, {pair.a.tensor for pair in pairs}, threads=threads)
        self._free_b = Segments(b.graph, {pair.b.tensor for pair in pairs}, threads=threads)
        pairs, self.left_out = self._of_one_shape(pairs, first)
        self._pairs = {pair.b.tensor: pair for pair in pairs}
        cut = CutGraph(b.graph, [pair.b for pair in pairs])
        self.rows = tuple(_rows(a, b, pairs, cut))
        if not self.rows:
            raise IntqError(
                f"A ({len(a.readings)} tensors) and B ({len(b.readings)}) have no tensor in "
                "common; expected the same names; compare two forms of one model"
            )
        self._groups = list(self._grouped(cut, threads))

    def add(self, batch: Batch) -> None:
        """Run one batch, and count the errors."""
        feeds_b = self._b.feeds(batch)
        a = _Stream(self._free_a.run(self._a.feeds(batch)))
        b = _Stream(self._free_b.run(feeds_b))
        for group in self._groups:
            for row in group.rows:
                pair = self._pairs[row.tensor]
                row.free.add(pair.a, a[pair.a.tensor], pair.b, b.pop(row.tensor))
            made = group.part.run(self._forced(group.part, a, feeds_b))
            for row in group.rows:
                pair = self._pairs[row.tensor]
                row.forced.add(pair.a, a[pair.a.tensor], pair.b, made[row.tensor])
            for name in group.last:
                a.pop(name)

    def _forced(self, part: Part, a: _Stream, feeds_b: Batch) -> Batch:
        """A's values, as B holds them, for the layers of a part."""
        pairs = {name: self._pairs.get(name) for name in part.inputs}
        return {
            name: pair.b.store(a[pair.a.tensor], pair.a) if pair else feeds_b[name]
            for name, pair in pairs.items()
        }

    def _of_one_shape(
        self, pairs: Sequence[_Pair], batch: Batch
    ) -> tuple[list[_Pair], tuple[tuple[str, str], ...]]:
        """Leave out pairs that only share a name: they differ in shape."""
        a = {name: list(v.shape) for name, v in self._free_a.run(self._a.feeds(batch))}
        b = {name: list(v.shape) for name, v in self._free_b.run(self._b.feeds(batch))}
        differ = [pair for pair in pairs if a[pair.a.tensor] != b[pair.b.tensor]]
        left_out = tuple(
            (pair.b.name, f"has shape {a[pair.a.tensor]} in A, {b[pair.b.tensor]} in B")
            for pair in differ
        )
        return [pair for pair in pairs if pair not in differ], left_out

    def _grouped(self, cut: CutGraph, threads: int | None) -> Iterator[_Group]:
        last: dict[str, int] = {}
        found = []
        for start in range(0, len(self.rows), SIZE):
            rows = self.rows[start : start + SIZE]
            part = cut.part([row.tensor for row in rows], threads=threads)
            used = [row.tensor for row in rows] + [n for n in part.inputs if n in self._pairs]
            last |= {self._pairs[name].a.tensor: start for name in used}
            found.append((start, rows, part))
        for start, rows, part in found:
            yield _Group(rows, part, {name for name, number in last.items() if number == start})


def _pairs(a: View, b: View) -> list[_Pair]:
    """The tensors of B that A has, too, in B's order."""
    found = defaultdict[str, list[Reading]](list)
    for reading in a.readings:
        found[reading.name].append(reading)
    matches = [(counterpart(reading, found), reading) for reading in b.readings]
    return [_Pair(held, reading) for held, reading in matches if held is not None]


def _rows(a: View, b: View, pairs: Sequence[_Pair], cut: CutGraph) -> Iterator[Row]:
    """One row per tensor and grid: copies of the same integers are forced, but not compared."""
    given = {tensor.name for tensor in b.graph.inputs}
    outputs = {tensor.name for tensor in b.graph.outputs}
    firsts: dict[tuple[str, float | None], int] = {}
    numbers: dict[str, int] = {}
    operators = _operators(a, [pair.a for pair in pairs])
    for pair in pairs:
        held, key = pair.b, (pair.b.name, pair.b.scale)
        if held.tensor in given:
            continue
        copied = key in firsts
        numbers[held.tensor] = firsts.setdefault(key, len(firsts))
        if copied:
            continue
        found = cut.layer(held.tensor)
        yield Row(
            name=held.name,
            tensor=held.tensor,
            operators=operators.get(pair.a.tensor) or found.operators,
            nodes=found.nodes,
            inputs=tuple(sorted({numbers[n] for n in found.inputs if n in numbers})),
            scale=held.scale,
            zero_point=held.zero_point,
            same_grid=held.shares_grid(pair.a),
            output=held.name in outputs or held.tensor in outputs,
        )


def _operators(a: View, shared: Sequence[Reading]) -> Mapping[str, tuple[str, ...]]:
    """The operators of A's layers, by tensor, unless they are integer arithmetic."""
    if a.kind == "integer":
        return {}
    names = {reading.tensor for reading in shared}
    made = [t for node in a.graph.nodes for t in node.outputs if t.name in names]
    return {tensor.name: layer(tensor, names).operators for tensor in made}
