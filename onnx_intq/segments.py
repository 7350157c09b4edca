"""Runs a graph part by part and hands out inner tensors, holding those of one part at a time.

Making every tensor an output of one session would keep them all: 150 MB for ten seconds of speech
through QuartzNet15x5. The parts are consecutive, so nothing is computed twice.
Law: every tensor has the value it has in the whole graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.feeds import Batch
from onnx_intq.graph import hollow_from_graph, sort, subgraphs
from onnx_intq.runtime import Session


@dataclass
class Part:
    """Consecutive nodes of a graph, and the tensors that cross their border.

    Attributes:
        nodes: In graph order.
        inputs: Tensors the nodes read from before, by name.
        outputs: Tensors of theirs that are wanted or that later parts read, by name.
    """

    nodes: list[gs.Node]
    inputs: dict[str, gs.Tensor] = field(default_factory=dict[str, gs.Tensor])
    outputs: dict[str, gs.Tensor] = field(default_factory=dict[str, gs.Tensor])


class Segments:
    """Sessions for the consecutive parts of a graph."""

    def __init__(
        self,
        graph: gs.Graph,
        names: Collection[str],
        *,
        size: int = 32,
        threads: int | None = None,
    ) -> None:
        """Cut `graph` and load its parts.

        Args:
            graph: Not changed.
            names: Tensors to hand out: graph inputs, or outputs of its nodes.
            size: A part ends after this many of them. Graphs with tensors of unknown type, which
                cannot cross a border, stay in one part.
            threads: Threads that compute one operator, None for all cores.
        """
        self._names = frozenset(names)
        self._inputs = {t.name for t in graph.inputs}
        self._parts: list[tuple[Part, Session]] = [
            (
                part,
                Session(
                    hollow_from_graph(part_graph(graph, part)),
                    threads=threads,
                    spin=False,
                    arena=False,
                ),
            )
            for part in cut(_sorted(graph), self._names, size)
        ]

    def run(self, batch: Batch) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield (name, values) of every wanted tensor, graph inputs first, for one batch."""
        held = {name: np.asarray(batch[name]) for name in self._inputs}
        yield from ((name, held[name]) for name in sorted(self._names & self._inputs))
        for number, (part, session) in enumerate(self._parts):
            found = session.run({name: held[name] for name in part.inputs}, list(part.outputs))
            yield from ((name, found[name]) for name in part.outputs if name in self._names)
            later = {name for p, _ in self._parts[number + 1 :] for name in p.inputs}
            held = {name: v for name, v in (held | found).items() if name in later}
            del found


def cut(graph: gs.Graph, names: Collection[str], size: int) -> list[Part]:
    """Split the nodes that lead to tensors `names` into parts with `size` of these each.

    The graph must be sorted topologically.
    """
    needed = _ancestors(graph, names)
    parts = [Part([])]
    for node in needed:
        if _is_dequantizer(node) and not any(t.name in names for t in node.outputs):
            continue  # stands in every part that reads it
        if len(parts[-1].outputs) >= size and _all_typed(needed):
            parts.append(Part([]))
        missing = [m for m in _dequantizers(node) if all(m is not n for n in parts[-1].nodes)]
        parts[-1].nodes += [*missing, node]
        parts[-1].outputs |= {t.name: t for t in node.outputs if t.name in names}
    made: dict[str, Part] = {}
    for part in parts:
        for node in part.nodes:
            for tensor in reads(node):
                if made.get(tensor.name) is not part:
                    part.inputs[tensor.name] = tensor
                    if tensor.name in made:
                        made[tensor.name].outputs[tensor.name] = tensor
            made |= {t.name: part for t in node.outputs if t.name}
    return parts if needed else []


def _sorted(graph: gs.Graph) -> gs.Graph:
    """A copy in which nodes stand close to those that read from them, as borders should be few."""
    copied = graph.copy()
    sort(copied)
    return copied


def _is_dequantizer(node: gs.Node) -> bool:
    return bool(node.op == "DequantizeLinear")


def _dequantizers(node: gs.Node) -> list[gs.Node]:
    """The nodes that dequantize what `node` reads: onnxruntime fuses them with it."""
    makers = {id(m): m for t in reads(node) for m in t.inputs if _is_dequantizer(m)}
    return list(makers.values())


def reads(node: gs.Node) -> list[gs.Variable]:
    """The run-time tensors a node reads, those its sub-graphs take from outside included."""
    bodies = [b for v in node.attrs.values() if isinstance(v, gs.Graph) for b in subgraphs(v)]
    own = {t.name for b in bodies for t in [*b.inputs, *(o for n in b.nodes for o in n.outputs)]}
    inner = [t for b in bodies for t in [*b.outputs, *(i for n in b.nodes for i in n.inputs)]]
    found = [*node.inputs, *(t for t in inner if t.name not in own)]
    return [t for t in found if isinstance(t, gs.Variable) and t.name]


def _ancestors(graph: gs.Graph, names: Collection[str]) -> list[gs.Node]:
    wanted, found = set(names), list[gs.Node]()
    for node in reversed(graph.nodes):
        if any(t.name in wanted for t in node.outputs):
            found.append(node)
            wanted |= {t.name for t in reads(node)}
    return found[::-1]


def _all_typed(nodes: list[gs.Node]) -> bool:
    return all(t.dtype is not None and t.type == "tensor_type" for n in nodes for t in n.outputs)


def part_graph(graph: gs.Graph, part: Part) -> gs.Graph:
    """A graph of its own: the copied border tensors no longer know the nodes outside."""
    shared = gs.Graph(
        nodes=list(part.nodes),
        inputs=list(part.inputs.values()),
        outputs=list(part.outputs.values()),
        opset=graph.opset,
        import_domains=graph.import_domains,
        functions=graph.functions,
        ir_version=graph.ir_version,
    )
    return shared.copy()
