"""Cuts a graph at the tensors that two models share: the layers between them, to run each alone.

Before: `a = f(x), b = g(a)`, shared a and b.   After: `a' = f(x), b' = g(a)`, with a new input a.
Law: fed the values that the whole graph gives, the cut graph makes the same values again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnx_intq.compare_tensors import Array, Reading
from onnx_intq.feeds import Batch
from onnx_intq.graph import Names, producer
from onnx_intq.placement import WEIGHTED
from onnx_intq.qdq import QDQ, QUANTIZE
from onnx_intq.segments import Segments, cut, reads

ALL = 1 << 30
"""More tensors than a graph has: one part."""
HEAVY = WEIGHTED | {"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
"""Operators after which a long layer is called."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The nodes between shared tensors and one that they lead to.

    Attributes:
        nodes: Their names, from the inputs to the result.
        operators: Theirs; Q and DQ only where there is nothing else.
        inputs: The shared tensors it reads.
    """

    nodes: tuple[str, ...]
    operators: tuple[str, ...]
    inputs: tuple[str, ...]


class Part:
    """Layers of a cut graph that run together, each on its own inputs.

    Attributes:
        inputs: What `run` takes: shared tensors, and inputs of the whole graph.
    """

    inputs: tuple[str, ...]

    def __init__(self, graph: gs.Graph, computed: dict[str, str], threads: int | None) -> None:
        """Load the layers of `graph` that make the tensors `computed`, shared -> computed name."""
        (part,) = cut(graph, list(computed.values()), ALL)
        alone = gs.Graph(
            nodes=part.nodes,
            inputs=list(part.inputs.values()),
            opset=graph.opset,
            import_domains=graph.import_domains,
            functions=graph.functions,
            ir_version=graph.ir_version,
        )
        self.inputs = tuple(part.inputs)
        self._shared = {name: shared for shared, name in computed.items()}
        self._segments = Segments(alone, list(self._shared), size=ALL, threads=threads)

    def run(self, feeds: Batch) -> dict[str, Array]:
        """What the layers make of `feeds`, by the names of the shared tensors."""
        return {self._shared[name]: values for name, values in self._segments.run(feeds)}


class CutGraph:
    """A copy of a graph in which every shared tensor is an input for those who read it."""

    def __init__(self, graph: gs.Graph, shared: Sequence[Reading]) -> None:
        """Cut a copy of `graph` at the tensors of `shared`; both are sorted topologically."""
        self._graph = graph.copy()
        self._made = {t.name: t for node in self._graph.nodes for t in node.outputs}
        self._shared = {reading.tensor for reading in shared}
        self._meaning = {reading.tensor: reading.name for reading in shared}
        self._computed: dict[str, str] = {}
        names = Names(self._graph)
        for reading in shared:
            if reading.tensor in self._made:  # a graph input is an input already
                self._cut(self._made[reading.tensor], names)

    def layer(self, tensor: str) -> Layer:
        """The layer that makes the shared tensor of this name."""
        return layer(self._made[self._computed[tensor]], self._shared)

    def part(self, tensors: Sequence[str], *, threads: int | None = None) -> Part:
        """The layers that make the shared tensors of these names, loaded into onnxruntime."""
        return Part(self._graph, {name: self._computed[name] for name in tensors}, threads)

    def _cut(self, tensor: gs.Variable, names: Names) -> None:
        """Let a new tensor take the place of `tensor` at its producer: the readers keep the old."""
        (maker,) = tensor.inputs
        computed = gs.Variable(names.new(f"{tensor.name}_computed"), tensor.dtype, tensor.shape)
        maker.outputs[next(i for i, t in enumerate(maker.outputs) if t is tensor)] = computed
        self._computed[tensor.name] = computed.name
        self._made[computed.name] = computed
        for reader in [node for node in tensor.outputs if node.op == QUANTIZE]:
            if self._meaning.get(reader.outputs[0].name) == self._meaning[tensor.name]:
                reader.inputs[0] = computed  # it belongs to the layer: puts its result on a grid


def layer(tensor: gs.Tensor, shared: Collection[str]) -> Layer:
    """The nodes that make `tensor` from tensors named in `shared`, constants and graph inputs."""
    nodes: dict[int, gs.Node] = {}
    inputs: dict[str, None] = {}
    waiting = [producer(tensor)]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in nodes:
            continue
        nodes[id(node)] = node
        for read in reads(node):
            if read.name in shared:
                inputs[read.name] = None
            else:
                waiting.append(producer(read))
    operators = [node.op for node in reversed(nodes.values())]
    computing = [op for op in operators if op not in QDQ]
    return Layer(
        nodes=tuple(node.name for node in reversed(nodes.values())),
        operators=tuple(computing or operators),
        inputs=tuple(inputs),
    )


def describe(operators: Sequence[str], most: int = 3) -> str:
    """Operators in few words, such as "Conv+Relu", or "ConvInteger and 9 more"."""
    if len(operators) <= most:
        return "+".join(operators)
    first = next((op for op in operators if op in HEAVY), operators[-1])
    return f"{first} and {len(operators) - 1} more"
