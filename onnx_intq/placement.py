"""Which tensors of a float graph are quantized, per target, and why the others are not.

A plan is made from the graph alone, before anything is edited; the pass `insert_qdq` carries it
out. Rules: operators with int8 kernels are quantized; a mel front end, the inputs of operators
that amplify rounding errors, and sums that a LayerNormalization reads stay float.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import onnx_graphsurgeon as gs

from onnx_intq.graph import producer, sole_consumer, subgraphs
from onnx_intq.transform import IntqError

WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators whose second input is usually a constant weight."""
QUANTIZABLE = {"ort": WEIGHTED | {"Add"}, "tensorrt": WEIGHTED | {"Add"}}
"""Operators that run on int8 inputs, per target."""
SAME_GRID = {"MaxPool", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}
"""Operators that move values and do not change them: output and input share one scale."""
FUSED = {"Relu", "Clip"}
"""Activations that run inside the operator before them."""
SENSITIVE = {"Log", "Sqrt", "Pow", "Reciprocal", "Div"}
"""Operators that amplify a rounding error of their input near zero without bound."""
FRONT_END = {"Log", "STFT", "DFT", "MelWeightMatrix"}
"""Operators that mark a graph's own mel front end."""
ELEMENTWISE = {"Add", "Sub", "Mul", "Max", "Min", "Clip", "Abs", "Cast", "ReduceSum", "ReduceMean"}
ELEMENTWISE |= SAME_GRID | {"Identity", "Relu", "Div", "Sqrt", "Pow", "Sum", "Concat", "Slice"}


@dataclass
class Plan:
    """What to quantize.

    Attributes:
        nodes: The nodes that will run on integers, in graph order.
        tensors: Names of the float tensors that get a Q/DQ pair, in graph order.
        skipped: (node, reason) for every quantizable node that stays float.
    """

    nodes: list[gs.Node] = field(default_factory=list)
    tensors: dict[str, gs.Tensor] = field(default_factory=dict)
    skipped: list[tuple[gs.Node, str]] = field(default_factory=list)


def plan(graph: gs.Graph, target: str, keep: Iterable[str] = ()) -> Plan:
    """Decide what to quantize for `target` ("ort" or "tensorrt").

    Args:
        graph: A float graph with inferred shapes.
        target: Whose rules to follow.
        keep: Glob patterns of node names that stay float.

    Raises:
        IntqError: Unknown target, or quantizable nodes inside If, Loop or Scan bodies.
    """
    if target not in QUANTIZABLE:
        raise IntqError(f"unknown target {target!r}; expected one of: {', '.join(QUANTIZABLE)}")
    _refuse_bodies(graph, QUANTIZABLE[target])
    found = Plan()
    front, sensitive = _front_end(graph), _sensitive_tensors(graph)
    for node in graph.nodes:
        if node.op not in QUANTIZABLE[target] or _is_bias(node):
            continue
        if why := _reason_against(node, list(keep), front):
            found.skipped.append((node, why))
        else:
            found.nodes.append(node)
    depth = _depths(graph) if target == "tensorrt" else {}
    for node in found.nodes:
        if target == "ort":
            chosen = [*_activations(node), *_outputs(graph, node, sensitive)]
        else:
            chosen = [_residual(node, depth)] if node.op == "Add" else _activations(node)
        found.tensors |= {t.name: t for t in chosen}
    return found


def fused_output(graph: gs.Graph, node: gs.Node) -> gs.Tensor:
    """The tensor that leaves a quantized node: behind its bias Add and activation, if any."""
    tensor = node.outputs[0]
    consumer = sole_consumer(graph, tensor)
    if consumer is not None and node.op == "MatMul" and _is_bias(consumer):
        tensor = consumer.outputs[0]
        consumer = sole_consumer(graph, tensor)
    if consumer is not None and consumer.op in FUSED and consumer.inputs[0] is tensor:
        return consumer.outputs[0]
    return tensor


def _reason_against(node: gs.Node, keep: list[str], front: set[int]) -> str:
    if any(fnmatchcase(node.name, pattern) for pattern in keep):
        return "kept float by request"
    if id(node) in front:
        return "part of the mel front end, whose dynamic range int8 cannot hold"
    if node.op == "Add":
        return _reason_against_add(node)
    if node.op in WEIGHTED and not isinstance(node.inputs[1], gs.Constant) and node.op != "MatMul":
        return "its weights are computed at run time"
    if all(isinstance(t, gs.Constant) for t in node.inputs[:2]):
        return "all its inputs are constant"
    return ""


def _reason_against_add(node: gs.Node) -> str:
    if any(isinstance(t, gs.Constant) for t in node.inputs):
        return "adds a constant, which is cheap and exact in float"
    if any(c.op in {"LayerNormalization", "ReduceMean"} for c in node.outputs[0].outputs):
        return "a residual sum that a LayerNormalization reads; int8 would lose it"
    makers = [producer(t) for t in node.inputs]
    if not all(m is not None and m.op in WEIGHTED | FUSED | {"Add"} | SAME_GRID for m in makers):
        return "one of its inputs is made by an operator that stays float"
    return ""


def _is_bias(node: gs.Node) -> bool:
    """Whether `node` adds a constant vector to a matrix product: it fuses into the product."""
    if node.op != "Add" or not any(isinstance(t, gs.Constant) for t in node.inputs):
        return False
    makers = [producer(t) for t in node.inputs]
    return any(m is not None and m.op == "MatMul" for m in makers)


def _activations(node: gs.Node) -> list[gs.Tensor]:
    return [t for t in node.inputs[:2] if not isinstance(t, gs.Constant)]


def _outputs(graph: gs.Graph, node: gs.Node, sensitive: set[int]) -> Iterator[gs.Tensor]:
    tensor = fused_output(graph, node)
    if id(tensor) not in sensitive and id(node.outputs[0]) not in sensitive:
        yield tensor


def _residual(add: gs.Node, depth: dict[int, int]) -> gs.Tensor:
    """The operand to quantize: the shorter branch; the other fuses its Conv with the Add."""
    return min(add.inputs, key=lambda t: depth.get(id(producer(t)), 0))


def _depths(graph: gs.Graph) -> dict[int, int]:
    depth: dict[int, int] = {}
    for node in graph.nodes:
        above = [depth.get(id(producer(t)), 0) for t in node.inputs]
        depth[id(node)] = 1 + max(above, default=0)
    return depth


def _chain(node: gs.Node) -> Iterator[gs.Tensor]:
    """The tensors that reach `node` through elementwise operators alone."""
    stack, seen = list(node.inputs), set[int]()
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen or isinstance(tensor, gs.Constant):
            continue
        seen.add(id(tensor))
        yield tensor
        maker = producer(tensor)
        if maker is not None and maker.op in ELEMENTWISE:
            stack += maker.inputs


def _sensitive_tensors(graph: gs.Graph) -> set[int]:
    nodes = [n for n in graph.nodes if n.op in SENSITIVE and not _by_constant(n)]
    return {id(t) for n in nodes for t in _chain(n)}


def _by_constant(node: gs.Node) -> bool:
    return node.op == "Div" and isinstance(node.inputs[1], gs.Constant)


def _front_end(graph: gs.Graph) -> set[int]:
    """Every ancestor of an operator that marks a front end, unless it closes a softmax."""
    stack = [n for n in graph.nodes if n.op in FRONT_END and not _closes_softmax(n)]
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            stack += [m for t in node.inputs if (m := producer(t)) is not None]
    return seen


def _closes_softmax(node: gs.Node) -> bool:
    makers = (producer(t) for t in _chain(node))
    return any(m is not None and m.op in {"Softmax", "Exp", "Sigmoid"} for m in makers)


def _refuse_bodies(graph: gs.Graph, quantizable: set[str]) -> None:
    for body in list(subgraphs(graph))[1:]:
        for node in body.nodes:
            if node.op in quantizable & WEIGHTED:
                raise IntqError(
                    f"{node.op} {node.name!r} stands in the body of an If, Loop or Scan, whose "
                    "tensors cannot be calibrated; expected a graph without them; "
                    "export the model with the branch resolved"
                )
