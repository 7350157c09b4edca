"""Which tensors of a float graph are quantized, per target, and why the others are not.

A plan is made from the graph alone, before anything is edited; the pass `insert_qdq` carries it
out. Rules: operators with int8 kernels are quantized; a mel front end, the inputs of operators
that amplify rounding errors, and sums that a LayerNormalization reads stay float.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import onnx
import onnx_graphsurgeon as gs

from onnx_intq.graph import OTHER_FLOATS, element_type, producer, sole_consumer, subgraphs
from onnx_intq.transform import IntqError

WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators whose second input is usually a constant weight."""
CANDIDATES = WEIGHTED | {"Add", "LSTM"}
"""Operators that are quantized, or named with the reason why not."""
QUANTIZABLE = {
    "ort": CANDIDATES - {"ConvTranspose"},
    "integer": CANDIDATES - {"ConvTranspose"},
    "tensorrt": CANDIDATES - {"LSTM"},
}
"""Operators that run on int8 inputs, per target."""
EXACT = {"Add", "Sub", "LayerNormalization", "Softmax"}
"""Operators that are lowered to integers without tables, in every mode."""
SAME_GRID = {"MaxPool", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}
"""Operators that move values and do not change them: output and input share one scale."""
MOVING = SAME_GRID | {"Identity", "Slice", "Split", "Gather", "Expand", "Tile", "Pad"}
MOVING |= {"DepthToSpace", "SpaceToDepth", "GatherElements", "GatherND"}
MOVING |= {"GlobalMaxPool", "ReduceMax", "ReduceMin"}
"""All operators whose results hold values of their input, a part of them or more than once."""
FUSED = {"Relu", "Clip"}
"""Activations that run inside the operator before them."""
SENSITIVE = {"Log", "Sqrt", "Pow", "Reciprocal", "Div"}
"""Operators that amplify a rounding error of their input near zero without bound."""
FRONT_END = {"Log", "STFT", "DFT", "MelWeightMatrix"}
"""Operators that mark a graph's own mel front end."""
PROBABILITIES = {"Softmax", "Exp", "Sigmoid"}
"""Operators whose logarithm is a network's result and no front end."""
ELEMENTWISE = {"Add", "Sub", "Mul", "Max", "Min", "Clip", "Abs", "Cast", "ReduceSum", "ReduceMean"}
ELEMENTWISE |= SAME_GRID | {"Identity", "Relu", "Div", "Sqrt", "Pow", "Sum", "Concat", "Slice"}


@dataclass
class Plan:
    """What to quantize.

    Attributes:
        nodes: The nodes that will run on integers, in graph order.
        tensors: Names of the float tensors that get a Q/DQ pair, in graph order.
        integers: Names of those that are computed as integers, so that all their readers read the
            pair; the others exist in float, too, for readers that are not in `nodes`.
        skipped: (node, reason) for every quantizable node that stays float.
    """

    nodes: list[gs.Node] = field(default_factory=list)
    tensors: dict[str, gs.Tensor] = field(default_factory=dict)
    integers: set[str] = field(default_factory=set)
    skipped: list[tuple[gs.Node, str]] = field(default_factory=list)

    def first(self, tensor: gs.Tensor) -> gs.Tensor:
        """The planned tensor whose values it holds: where they are only moved, the moves' input."""
        return [t for t in origin(tensor) if t.name in self.tensors][-1]


def plan(
    graph: gs.Graph,
    target: str,
    keep: Iterable[str] = (),
    floats: Mapping[str, str] | None = None,
    *,
    tables: bool = False,
    scores: Collection[str] = (),
) -> Plan:
    """Decide what to quantize for `target` ("ort", "integer" or "tensorrt").

    Args:
        graph: A float graph with inferred shapes, its nodes in topological order.
        target: Whose rules to follow; "integer" are ort's, but for results that `complete_qdq`
            gives 16 bits.
        keep: Glob patterns of node names that stay float.
        floats: Further nodes that stay float: name -> the reason.
        tables: For target "integer": functions will be tables, of 8-bit arguments.
        scores: Names of results that are compared with each other, for which 8 bits are too few:
            they stay float, and `complete_qdq` gives them 16.

    Raises:
        IntqError: Unknown target, or quantizable nodes inside If, Loop or Scan bodies.
    """
    if target not in QUANTIZABLE:
        raise IntqError(f"unknown target {target!r}; expected one of: {', '.join(QUANTIZABLE)}")
    patterns = list(keep)
    _refuse_bodies(graph, patterns)
    rules = _Rules(graph, target, patterns, floats or {})
    found = Plan()
    for node in graph.nodes:
        if node.op not in CANDIDATES or is_bias(node) or _is_integer(node):
            continue
        if why := rules.reason_against(node):
            found.skipped.append((node, why))
        else:
            rules.quantized.add(id(node))
            found.nodes.append(node)
    if target == "tensorrt":
        _choose_inputs(graph, found)
    else:
        _choose_both_sides(rules, found, scores, tables=tables)
    return found


def origin(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """The tensor itself, then those whose values it holds, moved: its input, and so on."""
    yield tensor
    while (maker := producer(tensor)) is not None and maker.op in SAME_GRID:
        tensor = maker.inputs[0]
        yield tensor


def is_bias(node: gs.Node) -> bool:
    """Whether `node` adds a constant vector to a matrix product: it fuses into the product."""
    if node.op != "Add" or not any(isinstance(t, gs.Constant) for t in node.inputs):
        return False
    makers = [producer(t) for t in node.inputs]
    return any(m is not None and m.op == "MatMul" for m in makers)


def computer(tensor: gs.Tensor, moves: Collection[str] = SAME_GRID) -> gs.Node | None:
    """The node that computes a tensor's values, before they are moved, biased and activated.

    Args:
        tensor: Float.
        moves: Operators that count as moving values.
    """
    maker = producer(tensor)
    while maker is not None and (maker.op in moves or maker.op in FUSED or is_bias(maker)):
        computed = (t for t in maker.inputs if not isinstance(t, gs.Constant))
        maker = producer(next(computed, maker.inputs[0]))
    return maker


class _Rules:
    """What a graph's rules need to know of the whole graph.

    Attributes:
        quantized: Ids of the nodes that were chosen so far.
    """

    def __init__(
        self, graph: gs.Graph, target: str, keep: list[str], floats: Mapping[str, str]
    ) -> None:
        self._graph = graph
        self._target = target
        self._keep = keep
        self._floats = floats
        self._normalises = any(node.op in {"LayerNormalization", "Softmax"} for node in graph.nodes)
        self._own = {id(node) for node in graph.nodes}
        self._front = _front_end(graph)
        self._sensitive = _sensitive_tensors(graph)
        self.quantized: set[int] = set()

    def reason_against(self, node: gs.Node) -> str:
        """Why `node` stays float, "" if it need not."""
        if any(fnmatchcase(node.name, pattern) for pattern in self._keep):
            return "kept float by request"
        if node.name in self._floats:
            return self._floats[node.name]
        if id(node) in self._front:
            return "part of the mel front end, whose dynamic range int8 cannot hold"
        if node.op not in QUANTIZABLE[self._target]:
            return f"{self._target} has no integer {node.op}"
        if element_type(node.outputs[0]) is None:
            return "the type of its result is unknown"
        if any(m is not None and m.op == "DequantizeLinear" for m in map(producer, node.inputs)):
            return "quantized already"
        return self._reason_against_add(node) if node.op == "Add" else self._reason_against(node)

    def result(self, node: gs.Node) -> gs.Tensor:
        """The tensor that leaves a quantized node: behind its bias Add and activation, if any."""
        tensor = node.outputs[0]
        reader = self._reader(tensor)
        if reader is not None and node.op == "MatMul" and is_bias(reader):
            tensor = reader.outputs[0]
            reader = self._reader(tensor)
        if reader is not None and reader.op in FUSED and reader.inputs[0] is tensor:
            return reader.outputs[0]
        return tensor

    def stays_float(self, node: gs.Node) -> bool:
        """Whether the result of a node reaches an operator that amplifies rounding errors."""
        return id(node.outputs[0]) in self._sensitive or id(self.result(node)) in self._sensitive

    def is_read_in_float(self, node: gs.Node, *, tables: bool) -> bool:
        """Whether 8 bits of a result would serve nobody: its readers compute with more.

        onnxruntime's integer MatMul gives float as well, its Conv does not. For target integer,
        readers take 16 bits but for products and tables. Without norms and attention, logits have 8
        bits as for ort: then a network gives the very integers that its Q/DQ file gives.
        """
        result = self.result(node)
        found = list(_readers(result, MOVING))
        if not found or any(result is t for t in self._graph.outputs):
            return False
        if self._target == "ort" and node.op != "MatMul":
            return False
        if any(id(reader) in self.quantized for reader in found):
            return False
        if not self._normalises and any(reader.op == "LogSoftmax" for reader in found):
            return False
        return not tables or all(reader.op in EXACT for reader in found)

    def _reader(self, tensor: gs.Tensor) -> gs.Node | None:
        reader = sole_consumer(self._graph, tensor)
        return reader if id(reader) in self._own else None

    def _reason_against(self, node: gs.Node) -> str:
        if not isinstance(node.inputs[1], gs.Constant) and node.op != "MatMul":
            return "its weights are computed at run time"
        if all(isinstance(t, gs.Constant) for t in node.inputs[:2]):
            return "all its inputs are constant"
        if self._target != "tensorrt" and node.op != "MatMul" and self.stays_float(node):
            return f"its result must stay float, and ort has no integer {node.op} with that"
        return ""

    def _reason_against_add(self, node: gs.Node) -> str:
        if any(isinstance(t, gs.Constant) for t in node.inputs):
            return "adds a constant, which is cheap and exact in float"
        if any(c.op in {"LayerNormalization", "ReduceMean"} for c in _readers(node.outputs[0])):
            return "a residual sum that a LayerNormalization reads; int8 would lose it"
        if self.stays_float(node):
            return "its sum reaches an operator that amplifies rounding errors"
        if not all(id(computer(t)) in self.quantized for t in node.inputs):
            return "one of its inputs is made by an operator that stays float"
        return ""


def _choose_both_sides(
    rules: _Rules, found: Plan, scores: Collection[str], *, tables: bool
) -> None:
    """For onnxruntime: inputs and results of the nodes."""
    for node in found.nodes:
        float_ = rules.stays_float(node) or rules.is_read_in_float(node, tables=tables)
        float_ = float_ or node.op == "LSTM" or rules.result(node).name in scores
        results = [] if float_ else [rules.result(node)]
        found.integers |= {t.name for t in results}
        found.tensors |= {t.name: t for t in (*activations(node), *results)}
    moved = [t for t in found.tensors.values() if {o.name for o in origin(t)} & found.integers]
    found.integers |= {t.name for t in moved}


def _choose_inputs(graph: gs.Graph, found: Plan) -> None:
    """For TensorRT: inputs; of an Add, the shorter branch, so that the other's Conv fuses."""
    depth: dict[int, int] = {}
    for node in graph.nodes:
        above = [depth.get(id(producer(t)), 0) for t in node.inputs]
        depth[id(node)] = 1 + max(above, default=0)
    for node in found.nodes:
        chosen = activations(node)
        if node.op == "Add":
            chosen = [min(node.inputs, key=lambda t: depth.get(id(producer(t)), 0))]
        found.tensors |= {t.name: t for t in chosen}


def activations(node: gs.Node) -> list[gs.Tensor]:
    """The factors or addends of a node that are computed at run time."""
    factors = node.inputs[:1] if node.op == "LSTM" else node.inputs[:2]
    return [t for t in factors if not isinstance(t, gs.Constant)]


def _is_integer(node: gs.Node) -> bool:
    """Whether `node` computes with integers, as shape arithmetic does."""
    return element_type(node.outputs[0]) not in {None, onnx.TensorProto.FLOAT, *OTHER_FLOATS}


def _readers(tensor: gs.Tensor, moves: Collection[str] = SAME_GRID) -> Iterator[gs.Node]:
    """The nodes that read a tensor's values, be they moved before."""
    for node in tensor.outputs:
        if node.op in moves:
            for output in node.outputs:
                yield from _readers(output, moves)
        elif node.op != "Shape":
            yield node


def _sensitive_tensors(graph: gs.Graph) -> set[int]:
    """Ids of the tensors that reach a sensitive operator through elementwise operators alone."""
    nodes = [n for sub in subgraphs(graph) for n in sub.nodes if n.op in SENSITIVE]
    stack = [t for node in nodes if not _by_constant(node) for t in node.inputs]
    seen: set[int] = set()
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen or isinstance(tensor, gs.Constant):
            continue
        seen.add(id(tensor))
        maker = producer(tensor)
        if maker is not None and maker.op in ELEMENTWISE:
            stack += maker.inputs
    return seen


def _by_constant(node: gs.Node) -> bool:
    return node.op == "Div" and isinstance(node.inputs[1], gs.Constant)


def _front_end(graph: gs.Graph) -> set[int]:
    """Ids of every ancestor of an operator that marks a front end: not of a softmax's logarithm."""
    logarithms = _of_probabilities(graph)
    stack = [
        node
        for sub in subgraphs(graph)
        for node in sub.nodes
        if node.op in FRONT_END and not any(id(t) in logarithms for t in node.inputs)
    ]
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            stack += [m for t in node.inputs if (m := producer(t)) is not None]
    return seen


def _of_probabilities(graph: gs.Graph) -> set[int]:
    """Ids of the tensors that come from probabilities through elementwise operators alone."""
    found: set[int] = set()
    for sub in subgraphs(graph):
        for node in sub.nodes:
            through = node.op in ELEMENTWISE and any(id(t) in found for t in node.inputs)
            if node.op in PROBABILITIES or through:
                found |= {id(t) for t in node.outputs}
    return found


def _refuse_bodies(graph: gs.Graph, keep: list[str]) -> None:
    for body in list(subgraphs(graph))[1:]:
        for node in body.nodes:
            kept = any(fnmatchcase(node.name, pattern) for pattern in keep)
            if node.op in WEIGHTED and not kept:
                raise IntqError(
                    f"{node.op} {node.name!r} stands in the body of an If, Loop or Scan, whose "
                    "tensors cannot be calibrated; expected a graph without them; "
                    "export the model with the branch resolved"
                )
