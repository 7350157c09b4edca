"""Proves that a model computes with integers alone, by the types of all its tensors.

Law: nothing found means that every tensor, of the graph and of all bodies, has an integer or bool
type, but for the boundary: float32 inputs of the graph, each read by at most one QuantizeLinear and
nothing else; float32 outputs of the graph, each made by a DequantizeLinear and read by nothing;
and the constants that are the scales of these nodes. An input that nothing reads may be float32.

Types are derived (`tensor_types`). Operators are of the default domain, opset 17 or newer, and the
model has no functions of its own. Nothing here knows the passes that make such models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from onnx_intq.graph import model_from_graph
from onnx_intq.tensor_types import (
    DEFAULT_DOMAINS,
    Node,
    Tensor,
    TypedGraph,
    declared_outputs,
    typed_graph,
)

OLDEST_OPSET = 17
FLOAT = "tensor(float)"
INTEGERS = frozenset(
    f"tensor({kind}int{bits})" for kind in ("", "u") for bits in (2, 4, 8, 16, 32, 64)
) | {"tensor(bool)"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A place where the proof fails.

    Attributes:
        node: The node's name; "model" where no node is to blame.
        tensor: The tensor's name; "" where no tensor is to blame.
        why: What was found; what was expected.
    """

    node: str
    tensor: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What `examine` found.

    Attributes:
        findings: Where the proof fails; none if the model is integer-only.
        nodes: How many nodes the model has, bodies included.
        tensors: How many tensors.
        quantizers: How many QuantizeLinear stand on the boundary.
        dequantizers: How many DequantizeLinear.
        unread: The float inputs that nothing reads.
    """

    findings: tuple[Finding, ...]
    nodes: int
    tensors: int
    quantizers: int
    dequantizers: int
    unread: tuple[str, ...]


def is_integer_only(graph: gs.Graph) -> bool:
    """Whether a graph computes with integers, and with nothing else."""
    products = any(node.op in {"ConvInteger", "MatMulInteger"} for node in graph.nodes)
    return products and not prove(graph)


def prove(model: onnx.ModelProto | gs.Graph) -> list[Finding]:
    """Everything that keeps `model` from being integer-only; empty if it is.

    Args:
        model: As a file holds it; a graph is first written out as it would be saved.
    """
    return list(examine(model).findings)


def examine(model: onnx.ModelProto | gs.Graph) -> Proof:
    """The findings of `prove`, in the order of the nodes, and the size of what was proven."""
    proto = model if isinstance(model, onnx.ModelProto) else model_from_graph(model)
    graph = typed_graph(proto)
    boundary = _Boundary.of(graph)
    findings = (
        *_model_findings(proto, graph),
        *(found for node in graph.nodes for found in _node_findings(node, boundary)),
        *_tensor_findings(graph, boundary),
        *_output_findings(proto, graph),
    )
    return Proof(
        findings=findings,
        nodes=len(graph.nodes),
        tensors=len(graph.tensors),
        quantizers=len(boundary.quantizers),
        dequantizers=len(boundary.dequantizers),
        unread=tuple(
            t.name for t in graph.tensors if t.source == "input" and _unread_float(t, boundary)
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Boundary:
    """The nodes that may read or make float32 tensors, and who reads what."""

    quantizers: dict[Tensor, Node]
    dequantizers: dict[Tensor, Node]
    scales: frozenset[Tensor]
    readers: dict[Tensor, list[Node]]

    @classmethod
    def of(cls, graph: TypedGraph) -> _Boundary:
        quantizers: dict[Tensor, Node] = {}
        dequantizers: dict[Tensor, Node] = {}
        outer = [n for n in graph.nodes if not n.inner and n.domain in DEFAULT_DOMAINS]
        for node in outer:
            if node.op == "QuantizeLinear":
                for read in node.inputs[:1]:
                    if read and read.source == "input" and read.type == FLOAT:
                        quantizers.setdefault(read, node)
            elif node.op == "DequantizeLinear":
                for made in node.outputs:
                    if made in graph.outputs and made.type == FLOAT:
                        dequantizers[made] = node
        edge = (*quantizers.values(), *dequantizers.values())
        constants = {t for node in outer if node.op == "Constant" for t in node.outputs}
        return cls(
            quantizers=quantizers,
            dequantizers=dequantizers,
            scales=frozenset(
                t
                for node in edge
                for t in node.inputs[1:2]
                if t and (t.source == "constant" or t in constants)
            ),
            readers=graph.readers(),
        )

    def allows(self, node: Node, tensor: Tensor, position: int | None) -> bool:
        """Whether `node` may read the float32 `tensor` at `position`, or make it (None)."""
        if tensor.type != FLOAT:
            return False
        if position is None:
            return self.dequantizers.get(tensor) is node or (
                node.op == "Constant" and tensor in self.scales
            )
        if position == 1:
            return tensor in self.scales and node in self
        return position == 0 and self.quantizers.get(tensor) is node

    def __contains__(self, node: Node) -> bool:
        return node in self.quantizers.values() or node in self.dequantizers.values()


def _model_findings(model: onnx.ModelProto, graph: TypedGraph) -> Iterator[Finding]:
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= graph.opset <= newest:
        yield _of_model(f"opset {graph.opset}; expected {OLDEST_OPSET} to {newest}")
    for function in model.functions:
        yield Finding(
            node=function.name, tensor="", why="a function of the model's own; expected none"
        )
    if graph.problem:
        yield _of_model(f"types cannot be inferred: {graph.problem}")


def _of_model(why: str) -> Finding:
    return Finding(node="model", tensor="", why=why)


def _node_findings(node: Node, boundary: _Boundary) -> Iterator[Finding]:
    """At most one: the first reason why `node` may not be there."""
    made = [(None, tensor) for tensor in node.outputs]
    read = [(position, tensor) for position, tensor in enumerate(node.inputs) if tensor]
    first = node.outputs[0].name if node.outputs else ""
    if node.domain not in DEFAULT_DOMAINS:
        why = f"{node.op} of the domain {node.domain!r}; expected operators of the default domain"
        yield Finding(node=node.name, tensor=first, why=why)
        return
    for position, tensor in (*made, *read):
        if tensor.type and tensor.type not in INTEGERS:
            if boundary.allows(node, tensor, position):
                continue
            yield Finding(
                node=node.name, tensor=tensor.name, why=_why(node, tensor, position, boundary)
            )
            return
    if node.problem:
        yield Finding(node=node.name, tensor=first, why=f"{node.op} {node.problem}")
        return
    unknown = [tensor.name for tensor in node.outputs if tensor.type is None]
    # What follows from an unknown type is unknown as well: only the first node is named.
    if unknown and all(tensor.type for _, tensor in read):
        yield Finding(
            node=node.name, tensor=unknown[0], why=f"{node.op} makes a tensor of unknown type"
        )


def _why(node: Node, tensor: Tensor, position: int | None, boundary: _Boundary) -> str:
    if position is None:
        if node.op == "DequantizeLinear":
            return "dequantizes inside the graph; expected DequantizeLinear on outputs alone"
        return f"{node.op} makes {tensor.type}; expected integers"
    if node.op.startswith("QLinear"):
        return f"{node.op} takes float scales; expected integer operators"
    if node in boundary and position == 1:
        return "its scale is no float32 constant; expected an initializer"
    if node.op == "QuantizeLinear" and tensor in boundary.quantizers:
        return f"quantizes the input {tensor.name!r} again; expected one QuantizeLinear for it"
    if node.op == "QuantizeLinear":
        return "quantizes inside the graph; expected QuantizeLinear on inputs alone"
    return f"{node.op} reads {tensor.type}; expected integers"


def _tensor_findings(graph: TypedGraph, boundary: _Boundary) -> Iterator[Finding]:
    """Tensors that no node makes, where their readers do not tell."""
    for tensor in graph.tensors:
        if tensor.source == "node" or tensor.type in INTEGERS:
            continue
        if tensor.type is None:
            why = f"the {tensor.source} has no type; expected an integer type"
        elif tensor.source == "input" and tensor.type != FLOAT:
            why = f"the input is {tensor.type}; expected float32 or integers"
        elif tensor.source != "input" and tensor not in boundary.readers:
            why = f"{tensor.source} of type {tensor.type} that nothing reads; expected none"
        else:
            continue
        yield Finding(node="model", tensor=tensor.name, why=why)


def _output_findings(model: onnx.ModelProto, graph: TypedGraph) -> Iterator[Finding]:
    declared = declared_outputs(model)
    makers = {tensor: node.name for node in graph.nodes for tensor in node.outputs}
    for tensor in graph.outputs:
        node = makers.get(tensor, "model")
        if tensor.source != "node" and tensor.type not in INTEGERS:
            why = f"an output that is the {tensor.source} itself; expected a DequantizeLinear"
        elif tensor.source == "node" and tensor not in makers:
            why = "an output that nothing makes"
        elif tensor.type and declared[tensor.name] not in {None, tensor.type}:
            why = f"an output of type {tensor.type}; the file says {declared[tensor.name]}"
        else:
            continue
        yield Finding(node=node, tensor=tensor.name, why=why)


def _unread_float(tensor: Tensor, boundary: _Boundary) -> bool:
    return tensor.type == FLOAT and tensor not in boundary.readers
