"""Pairs the products of a quantized graph with the float ones they were made of, and runs both.

`sequential` runs the two graphs side by side, layer by layer over all feeds, and computes a layer
only when it is asked for: what the caller has changed of earlier layers' constants takes effect.
Law: where nothing is changed, the values are those of the whole graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq import qdq
from onnx_intq.feeds import Batch
from onnx_intq.graph import hollow_from_graph, sole_consumer, sort
from onnx_intq.placement import WEIGHTED, is_bias
from onnx_intq.products import Weight, weight
from onnx_intq.runtime import Session
from onnx_intq.segments import Part, cut, part_graph
from onnx_intq.transform import IntqError

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A product with a constant weight, quantized and in float.

    Attributes:
        node: In the quantized graph: reads a dequantized weight.
        original: The node of that name in the reference.
        index: Which input is the weight, 0 or 1.
        total: The tensor of the quantized graph that holds the sums, biased, not activated.
        original_total: The same tensor of the reference.
    """

    node: gs.Node
    original: gs.Node
    index: int
    total: gs.Tensor
    original_total: gs.Tensor

    @property
    def name(self) -> str:
        """Of the node, in both graphs."""
        return str(self.node.name)

    @property
    def x(self) -> gs.Tensor:
        """The activation in the quantized graph: dequantized, or float where weights alone are."""
        return self.node.inputs[1 - self.index]

    @property
    def original_x(self) -> gs.Tensor:
        """The activation in the reference."""
        return self.original.inputs[1 - self.index]

    @property
    def float_weight(self) -> Array:
        """The weight before it was quantized, float32, the shape of the stored one."""
        values: Array = self.original.inputs[self.index].values
        return values

    @property
    def stored(self) -> gs.Constant:
        """The integers; give its `values` others of that type and shape to change the weight."""
        return self.dequantizer.inputs[0]

    @property
    def dequantizer(self) -> gs.Node:
        """The node that dequantizes the weight; others may read it too."""
        return self.node.inputs[self.index].inputs[0]

    @property
    def quantized_weight(self) -> Weight:
        """The weight as centred integers and scales."""
        return weight(self.node.inputs[self.index])


def layers(model: gs.Graph, reference: gs.Graph) -> list[Layer]:
    """The products of `model` that read a stored weight, in order.

    Args:
        model: With Q/DQ nodes, weights quantized; its nodes get sorted topologically.
        reference: The float model it was made of. Products without a counterpart are left out.
    """
    sort(model)
    known = {node.name: node for node in reference.nodes}
    found = []
    for node in model.nodes:
        index = _weight_index(node)
        original = known.get(node.name)
        if index is None or original is None or original.op != node.op:
            continue
        if isinstance(original.inputs[index], gs.Constant):
            totals = total(model, node), total(reference, original)
            found.append(
                Layer(
                    node=node,
                    original=original,
                    index=index,
                    total=totals[0],
                    original_total=totals[1],
                )
            )
    return found


def total(graph: gs.Graph, node: gs.Node) -> gs.Tensor:
    """The sums of a product: its result, behind the Add of its bias if there is one."""
    reader = sole_consumer(graph, node.outputs[0])
    biased = node.op == "MatMul" and reader is not None and is_bias(reader)
    return reader.outputs[0] if biased and reader is not None else node.outputs[0]


def sequential(
    model: gs.Graph, reference: gs.Graph, chosen: Sequence[Layer], feeds: Iterable[Batch]
) -> Iterator[tuple[Layer, list[Array], list[Array]]]:
    """Run both graphs as far as each layer's input, in the order of `chosen`.

    Constants of `model` may be changed between two layers; nodes may not be added.

    Args:
        model: Sorted topologically, as `layers` leaves it.
        reference: The float model.
        chosen: From `layers`, in their order.
        feeds: Batches for the graphs' inputs; all of them are held.

    Yields:
        The layer; its input in float, and as the quantized graph computes it: one array a batch.
    """
    batches = list(feeds)
    ours = _Walk(model, [layer.x.name for layer in chosen], batches)
    theirs = _Walk(reference, [layer.original_x.name for layer in chosen], batches)
    for number, layer in enumerate(chosen):
        later = chosen[number + 1 :]
        values = theirs.values(layer.original_x.name, {o.original_x.name for o in later})
        yield layer, values, ours.values(layer.x.name, {o.x.name for o in later})


def original_inputs(
    reference: gs.Graph, chosen: Sequence[Layer], feeds: Iterable[Batch]
) -> Iterator[tuple[Layer, list[Array]]]:
    """Run the float graph alone as far as each layer's input: one array a batch."""
    walk = _Walk(reference, [layer.original_x.name for layer in chosen], list(feeds))
    for number, layer in enumerate(chosen):
        later = {other.original_x.name for other in chosen[number + 1 :]}
        yield layer, walk.values(layer.original_x.name, later)


def totals(model: gs.Graph, layer: Layer, values: Iterable[Array]) -> list[Array]:
    """The sums of a layer of the quantized graph, as its constants are now, for given inputs.

    Args:
        model: The quantized graph.
        layer: Of that graph.
        values: Inputs of the layer: one array a batch.
    """
    return _totals(model, layer.node, layer.x, layer.total, values)


def original_totals(reference: gs.Graph, layer: Layer, values: Iterable[Array]) -> list[Array]:
    """The sums of a layer of the float graph, for given inputs."""
    return _totals(reference, layer.original, layer.original_x, layer.original_total, values)


def _totals(
    graph: gs.Graph, node: gs.Node, x: gs.Tensor, result: gs.Tensor, values: Iterable[Array]
) -> list[Array]:
    last = result.inputs[0]
    chain = [node] if last is node else [node, last]
    makers = [m for n in chain for t in n.inputs if t is not x and (m := qdq.dequantizer(t))]
    part = Part([*makers, *chain], {x.name: x}, {result.name: result})
    return [found[result.name] for found in _run(graph, part, [{x.name: v} for v in values])]


def _weight_index(node: gs.Node) -> int | None:
    if node.op not in WEIGHTED:
        return None
    makers = [qdq.dequantizer(t) for t in node.inputs[:2]]
    for index in (1, 0):
        maker, other = makers[index], node.inputs[1 - index]
        is_stored = maker is not None and isinstance(maker.inputs[0], gs.Constant)
        if is_stored and not isinstance(other, gs.Constant):
            return index
    return None


class _Walk:
    """Computes tensors of a graph one by one for all batches, and holds what is needed later."""

    def __init__(self, graph: gs.Graph, names: Sequence[str], batches: list[Batch]) -> None:
        self._graph, self._names = graph, names
        inputs = {t.name for t in graph.inputs}
        self._held: list[dict[str, Array]]
        self._held = [{n: np.asarray(v) for n, v in b.items() if n in inputs} for b in batches]
        self._parts = cut(_ordered(graph), {*names} - inputs, 1)
        self._next = 0

    def values(self, name: str, later: set[str]) -> list[Array]:
        """The values of tensor `name`; those in `later` are kept for later calls."""
        while any(name not in held for held in self._held):
            part = self._parts[self._next]
            self._next += 1
            found = _run(self._graph, part, self._held)
            needed = {n for p in self._parts[self._next :] for n in p.inputs} | later | {name}
            self._held = [
                {n: v for n, v in (held | new).items() if n in needed}
                for held, new in zip(self._held, found, strict=True)
            ]
        return [held[name] for held in self._held]


def _ordered(graph: gs.Graph) -> gs.Graph:
    sort(graph)
    return graph


def _run(
    graph: gs.Graph, part: Part, batches: Sequence[Mapping[str, Array]]
) -> list[dict[str, Array]]:
    """What a part computes now, for each batch."""
    session = _session(part_graph(graph, part))
    names = list(part.outputs)
    return [session.run({n: held[n] for n in part.inputs}, names) for held in batches]


def _session(graph: gs.Graph) -> Session:
    """Optimized where onnxruntime can."""
    model = hollow_from_graph(graph)
    try:
        return Session(model, spin=False, arena=False)
    except IntqError:
        # Version 1.31 copies an int8 pair behind the Unsqueeze that reads it, makes the copy uint8,
        # but not the type that its QuantizeLinear says it gives, and then refuses its own node.
        return Session(model, spin=False, arena=False, optimize=False)
