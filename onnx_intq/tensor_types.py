"""The element type of every tensor of a model and its bodies, derived and never taken on trust.

What a file says about inner tensors, outputs and the inputs of bodies is thrown away. Types follow
from the graph's inputs, the constants and the nodes, by two judges: onnx's strict type inference,
and each operator's schema, whose type variables are bound by what the node reads. Types are
written as onnx's schemas write them: `tensor(float)`, `tensor(int8)`, `seq(tensor(bool))`.
"""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import onnx

from onnx_intq.graph import bare_model, first_line

Source = Literal["input", "constant", "default", "node", "body input"]
DEFAULT_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, eq=False, kw_only=True)
class Tensor:
    """A tensor, told from its namesakes in other bodies by identity.

    Attributes:
        name: Its name.
        type: As schemas write it; None where neither judge knows.
        source: "input" of the graph, "constant" (an initializer), "default" (an initializer that
            is an input of the graph too, which callers may replace), "body input", or "node".
    """

    name: str
    type: str | None
    source: Source


@dataclass(frozen=True, eq=False, kw_only=True)
class Node:
    """A node and its tensors.

    Attributes:
        name: Its name, else its operator and place.
        op: Its operator.
        domain: Of the operator.
        inner: Whether it stands in the body of another node.
        inputs: What it reads; None where an input is left out.
        outputs: What it makes.
        problem: What is wrong with its types, "" if nothing.
    """

    name: str
    op: str
    domain: str
    inner: bool
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    problem: str


@dataclass(kw_only=True)
class TypedGraph:
    """All nodes and tensors of a model, bodies included.

    Attributes:
        opset: Version of the default domain, 0 without one.
        nodes: In order, those of a body behind the node that has it.
        tensors: Every tensor once.
        outputs: The model's outputs.
        problem: Why the strict inference refused the model, "" if it did not.
    """

    opset: int
    nodes: list[Node] = field(default_factory=list[Node])
    tensors: list[Tensor] = field(default_factory=list[Tensor])
    outputs: list[Tensor] = field(default_factory=list[Tensor])
    problem: str = ""

    def readers(self) -> dict[Tensor, list[Node]]:
        """The nodes that read each tensor, in order; a node twice if it reads it twice."""
        found = defaultdict[Tensor, list[Node]](list)
        for node in self.nodes:
            for tensor in node.inputs:
                if tensor is not None:
                    found[tensor].append(node)
        return found


def typed_graph(model: onnx.ModelProto) -> TypedGraph:
    """Derive the types of all tensors of `model`, which is not changed.

    An output that no node makes gets a tensor of unknown type.
    """
    opsets = {each.domain: each.version for each in model.opset_import}
    found = TypedGraph(opset=max(opsets.get(domain, 0) for domain in DEFAULT_DOMAINS))
    inferred, found.problem = _inferred(model)
    walk, scope = _Walk(found), ChainMap[str, Tensor]()
    given = {value.name for value in model.graph.input}
    constants = _constants(model.graph)
    for name, type_ in constants.items():
        walk.tensor(scope, name, type_, "default" if name in given else "constant")
    for value in model.graph.input:
        if value.name not in constants:
            walk.tensor(scope, value.name, _text(value.type), "input")
    walk.nodes(inferred.graph, scope, _types(inferred.graph))
    for value in model.graph.output:
        unknown = Tensor(name=value.name, type=None, source="node")
        found.outputs.append(scope.get(value.name, unknown))
    return found


def declared_outputs(model: onnx.ModelProto) -> dict[str, str | None]:
    """The types that the file says its outputs have."""
    return {value.name: _text(value.type) for value in model.graph.output}


def forget_types(graph: onnx.GraphProto) -> None:
    """Take away, in place, all types but those of the graph's inputs and of constants."""
    del graph.value_info[:]
    for value in graph.output:
        value.ClearField("type")
    for node in graph.node:
        for body in _bodies(node):
            for value in body.input:
                value.ClearField("type")
            forget_types(body)


def _inferred(model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """The model, small, with the types that onnx infers, and why it refuses the model, if so."""
    bare = bare_model(model)
    forget_types(bare.graph)
    problem = ""
    for strict in (True, False):
        try:
            return onnx.shape_inference.infer_shapes(
                bare, check_type=strict, strict_mode=strict, data_prop=strict
            ), problem
        except (onnx.shape_inference.InferenceError, ValueError) as error:
            problem = problem or first_line(error)
    return bare, problem


def _bodies(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


@dataclass(frozen=True)
class _Walk:
    """Adds what it meets to `found`, a graph and then its bodies."""

    found: TypedGraph

    def nodes(
        self,
        graph: onnx.GraphProto,
        scope: ChainMap[str, Tensor],
        types: Mapping[str, str | None],
        prefix: str = "",
    ) -> None:
        """The nodes of a graph whose inputs and constants are in `scope`, and their bodies."""
        for number, proto in enumerate(graph.node):
            name = proto.name or f"{prefix}{proto.op_type}_{number}"
            self.node(proto, name, scope, types)
            for body in _bodies(proto):
                self.body(body, scope.new_child(), f"{name}_")

    def node(
        self,
        proto: onnx.NodeProto,
        name: str,
        scope: ChainMap[str, Tensor],
        types: Mapping[str, str | None],
    ) -> None:
        inputs = tuple(scope.get(each) if each else None for each in proto.input)
        by_schema, problem = _by_schema(proto, inputs, self.found.opset)
        for each in proto.input:
            if each and each not in scope:
                problem = f"reads {each!r}, which nothing before it makes"
        outputs = []
        for output, derived in zip(proto.output, by_schema, strict=True):
            inferred = types.get(output)
            if derived and inferred and derived != inferred:
                problem = f"makes {derived} by its schema, {inferred} by inference"
            if output:
                outputs.append(self.tensor(scope, output, derived or inferred, "node"))
        self.found.nodes.append(
            Node(
                name=name,
                op=proto.op_type,
                domain=proto.domain,
                inner=len(scope.maps) > 1,
                inputs=inputs,
                outputs=tuple(outputs),
                problem=problem,
            )
        )

    def body(self, body: onnx.GraphProto, scope: ChainMap[str, Tensor], prefix: str) -> None:
        types = _types(body)
        for name, type_ in _constants(body).items():
            self.tensor(scope, name, type_, "constant")
        for value in body.input:
            self.tensor(scope, value.name, types[value.name], "body input")
        self.nodes(body, scope, types, prefix)

    def tensor(
        self, scope: ChainMap[str, Tensor], name: str, type_: str | None, source: Source
    ) -> Tensor:
        found = scope[name] = Tensor(name=name, type=type_, source=source)
        self.found.tensors.append(found)
        return found


def _by_schema(
    node: onnx.NodeProto, inputs: Sequence[Tensor | None], opset: int
) -> tuple[list[str | None], str]:
    """The types of a node's outputs as its schema tells them, None where it leaves them open."""
    unknown: list[str | None] = [None] * len(node.output)
    if node.domain not in DEFAULT_DOMAINS:
        return unknown, ""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return unknown, f"no operator {node.op_type} in opset {opset}"
    bound: dict[str, str] = {}
    problem = ""
    if len(inputs) > schema.max_input:
        problem = f"has {len(inputs)} inputs; expected at most {schema.max_input} in opset {opset}"
    for formal, tensor in zip(_formals(schema.inputs, len(inputs)), inputs, strict=False):
        if tensor is None or tensor.type is None or not formal.is_homogeneous:
            continue
        if tensor.type not in formal.types:
            problem = f"takes no {tensor.type} as {formal.name}"
        elif bound.setdefault(formal.type_str, tensor.type) != tensor.type:
            problem = f"takes {bound[formal.type_str]} and {tensor.type} together"
    formals = _formals(schema.outputs, len(node.output))
    known = [bound.get(each.type_str) or _only(each.types) for each in formals]
    return (known + unknown)[: len(unknown)], problem


def _formals(
    formals: Sequence[onnx.defs.OpSchema.FormalParameter], count: int
) -> list[onnx.defs.OpSchema.FormalParameter]:
    """The formal parameter of each of `count` actual ones; the last may stand for many."""
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    if formals and formals[-1].option == variadic:
        return [*formals[:-1], *[formals[-1]] * (count - len(formals) + 1)]
    return list(formals)


def _only(types: Iterable[str]) -> str | None:
    """The type, if there is but one."""
    first, *others = types
    return None if others else first


def _types(graph: onnx.GraphProto) -> dict[str, str | None]:
    """The types of a graph's tensors, as inference left them."""
    values = (*graph.input, *graph.output, *graph.value_info)
    return {value.name: _text(value.type) for value in values}


def _constants(graph: onnx.GraphProto) -> dict[str, str | None]:
    """The types of a graph's initializers."""
    dense = {t.name: f"tensor({_element(t.data_type)})" for t in graph.initializer}
    sparse = {
        t.values.name: f"sparse_tensor({_element(t.values.data_type)})"
        for t in graph.sparse_initializer
    }
    return {**dense, **sparse}


def _text(type_: onnx.TypeProto) -> str | None:
    """A type as schemas write it; None for none, or one without an element type."""
    kind: str | None = type_.WhichOneof("value")
    if kind in {"tensor_type", "sparse_tensor_type"}:
        element = getattr(type_, kind).elem_type
        return f"{kind[:-5]}({_element(element)})" if element else None
    if kind in {"sequence_type", "optional_type"}:
        return f"{'seq' if kind[0] == 's' else 'optional'}({_text(getattr(type_, kind).elem_type)})"
    return kind


def _element(number: int) -> str:
    name: str = onnx.TensorProto.DataType.Name(number)
    return name.lower()
