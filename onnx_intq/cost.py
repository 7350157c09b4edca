"""What a model costs: parameters, bytes, multiply-accumulates and bit operations.

A multiply-accumulate of an a-bit and a b-bit number counts a * b bit operations (BOPs: van Baalen
et al., Bayesian Bits, 2020; Q-ASR, table 1), one of floats 32 * 32.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant, metadata, producer, subgraphs, with_metadata
from onnx_intq.packing import decoded, unpack
from onnx_intq.shapes import Shape, infer, infer_body, input_shapes
from onnx_intq.transform import IntqError

BITS_KEY = "onnx_intq.bits"
"""Metadata key of a JSON object: weight tensor's name to the bits of the grid it lies on."""
OPERANDS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), (0, 1)),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), (0, 1)),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul"), (0, 3)),
}
"""Operators that are counted, with the numbers of the two inputs they multiply."""
RECURRENT = {"LSTM", "GRU", "RNN"}
"""Operators that multiply by two weights [directions, gates, factors] at every step of time."""
UNCOUNTED = {"Einsum", "Attention", "DeformConv"}
"""Operators that multiply, but are not counted; they are named."""
MOVES = {"Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split"}
MOVES |= {"MaxPool", "Pad", "Concat", "Expand", "DequantizeLinear"}
"""Operators whose result has as many distinct values as their first input."""
SCALES = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "ConvInteger": (2, 3),
    "MatMulInteger": (2, 3),
}
"""Inputs that are scales and zero points, not parameters."""


@dataclass(frozen=True, kw_only=True)
class NodeCost:
    """One node that multiplies.

    Attributes:
        name: Its name.
        op: Its operator.
        macs: Multiply-accumulates.
        bits: Of the two numbers it multiplies.
        elements: Values of its two factors and of its result.
    """

    name: str
    op: str
    macs: int
    bits: tuple[int, int]
    elements: tuple[int, int, int]

    @property
    def bops(self) -> int:
        """Bit operations."""
        return self.macs * math.prod(self.bits)


@dataclass(frozen=True, kw_only=True)
class Total:
    """What several nodes of one operator type cost together.

    Attributes:
        nodes: How many; a recurrent one is one, though it multiplies by two weights.
        macs: Multiply-accumulates.
        bops: Bit operations.
    """

    nodes: int
    macs: int
    bops: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs for inputs of given shapes.

    Attributes:
        parameters: Values of all floating-point and quantized constants, without scales and zero
            points.
        weight_bytes: Bytes of all constants as stored, packed ones with what decodes them.
        inputs: The shapes counted for.
        nodes: Every counted node, in graph order.
        uncounted: Names of nodes that multiply too, but whose kind or shape is not known here.
    """

    parameters: int
    weight_bytes: int
    inputs: Mapping[str, Shape]
    nodes: tuple[NodeCost, ...]
    uncounted: tuple[str, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all nodes."""
        return sum(node.macs for node in self.nodes)

    @property
    def bops(self) -> int:
        """Bit operations of all nodes."""
        return sum(node.bops for node in self.nodes)

    @property
    def by_op(self) -> dict[str, Total]:
        """Totals per operator type, the most expensive first."""
        totals = {}
        for op in {node.op for node in self.nodes}:
            nodes = [node for node in self.nodes if node.op == op]
            macs, bops = sum(n.macs for n in nodes), sum(n.bops for n in nodes)
            count = len(nodes) // (2 if op in RECURRENT else 1)
            totals[op] = Total(nodes=count, macs=macs, bops=bops)
        return dict(sorted(totals.items(), key=lambda item: (-item[1].bops, item[0])))


def cost(
    graph: gs.Graph,
    *,
    seconds: float = 10.0,
    batch: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Cost:
    """Count what one run of `graph` costs: float, QDQ and integer-only graphs alike.

    Args:
        graph: Not changed.
        seconds: Length of the audio; frames per second as the model's metadata says, else 100.
        batch: Utterances in one run: the first axis of every input that leaves it open.
        shapes: Shapes of inputs, instead.

    Raises:
        IntqError: The shapes or the batch do not fit the inputs, or `seconds` is not positive.
    """
    inputs = input_shapes(graph, seconds=seconds, shapes=shapes)
    inputs = _batched(graph, inputs, batch) if batch != 1 else inputs
    stored = sum(_stored_bytes(t) for t in _constants(graph))
    graph = _unpacked(graph)
    known, bits = infer(graph, inputs), _Bits(graph)
    nodes, uncounted = list[NodeCost](), list[str]()
    for node in graph.nodes:
        counted = _node_costs(node, known, bits)
        nodes += counted
        if not counted and _multiplies(node):
            uncounted.append(node.name)
    return Cost(
        parameters=sum(t.values.size for t in _parameters(graph)),
        weight_bytes=stored,
        inputs=inputs,
        nodes=tuple(nodes),
        uncounted=tuple(uncounted),
    )


def _unpacked(graph: gs.Graph) -> gs.Graph:
    """The graph with packed constants decoded, of as many bits as their indices."""
    packed = {str(each.node.outputs[0].name): each.bits for each in decoded(graph)}
    if not packed:
        return graph
    found = with_metadata(graph.copy(), graph)
    metadata(found)[BITS_KEY] = json.dumps(packed | recorded_bits(found))
    unpack(found)
    return found


def _batched(graph: gs.Graph, inputs: Mapping[str, Shape], batch: int) -> dict[str, Shape]:
    """The shapes with `batch` for every open first axis, and all axes of the same name."""
    declared = {t.name: list(t.shape or []) for t in graph.inputs}
    first = {axes[0] for axes in declared.values() if axes and not isinstance(axes[0], int)}
    if batch < 1 or not first:
        found = ", ".join(f"{name} {axes}" for name, axes in declared.items())
        raise IntqError(
            f"a batch of {batch} for inputs {found}; expected 1 or more, and inputs with an open "
            "first axis; change --batch, or export the model with a dynamic batch"
        )
    return {
        name: tuple(
            batch if axis in first and (axis or i == 0) else size
            for i, (axis, size) in enumerate(zip(declared[name], shape, strict=True))
        )
        for name, shape in inputs.items()
    }


def _node_costs(node: gs.Node, known: Mapping[str, Shape], bits: _Bits) -> list[NodeCost]:
    """Of a node and those of its body; none where a shape is unknown or the node is not counted."""
    if node.op == "Scan":
        return _scan_costs(node, known, bits)
    if node.op in RECURRENT:
        return _recurrent_costs(node, known, bits)
    found = _node_cost(node, known, bits)
    return [] if found is None else [found]


def _scan_costs(node: gs.Node, known: Mapping[str, Shape], bits: _Bits) -> list[NodeCost]:
    """Of the nodes in the body, once for every step."""
    body, scanned = node.attrs["body"], node.attrs["num_scan_inputs"]
    shapes = [known.get(t.name) for t in node.inputs]
    if None in shapes:
        return []
    inner = dict(known)
    axes = [None] * (len(shapes) - scanned) + node.attrs.get("scan_input_axes", [0] * scanned)
    steps = 0
    for tensor, shape, axis in zip(body.inputs, shapes, axes, strict=True):
        sizes = list(shape or ())
        steps = sizes.pop(axis) if axis is not None else steps
        inner[tensor.name] = tuple(sizes)
    found = infer_body(body, node, inner)
    nodes = [c for n in body.nodes for c in _node_costs(n, found, bits.inside(body))]
    return [_repeated(each, steps) for each in nodes]


def _repeated(found: NodeCost, times: int) -> NodeCost:
    """The same weights at every step: what is multiplied with them is read anew."""
    left, right, result = found.elements
    return replace(found, macs=found.macs * times, elements=(left * times, right, result * times))


def _recurrent_costs(node: gs.Node, known: Mapping[str, Shape], bits: _Bits) -> list[NodeCost]:
    """The product of the input and that of the hidden state, which is float between its steps."""
    x, w, r = (known.get(t.name) for t in node.inputs[:3])
    if x is None or w is None or r is None:
        return []
    rows, found = x[0] * x[1], []
    for index, weight, left in ((1, w, bits.of(node, 0)), (2, r, type_bits(np.float32))):
        elements = rows * weight[2], math.prod(weight), rows * weight[0] * weight[1]
        found.append(
            NodeCost(
                name=node.name,
                op=node.op,
                macs=rows * math.prod(weight),
                bits=(left, bits.of(node, index)),
                elements=elements,
            )
        )
    return found


def _node_cost(node: gs.Node, known: Mapping[str, Shape], bits: _Bits) -> NodeCost | None:
    """None where a shape is unknown or the node is not counted."""
    if node.op not in OPERANDS:
        return None
    factors = [node.inputs[i] for i in OPERANDS[node.op]]
    left, right, result = (known.get(t.name) for t in (*factors, node.outputs[0]))
    if left is None or right is None or result is None:
        return None
    return NodeCost(
        name=node.name,
        op=node.op,
        macs=_macs(node, left, right, result),
        bits=(bits.of(node, OPERANDS[node.op][0]), bits.of(node, OPERANDS[node.op][1])),
        elements=(math.prod(left), math.prod(right), math.prod(result)),
    )


def _macs(node: gs.Node, left: Shape, right: Shape, result: Shape) -> int:
    if node.op == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    if "Conv" in node.op:
        return math.prod(result) * math.prod(right[1:])
    return math.prod(result) * (left[0] if node.attrs.get("transA") else left[-1])


def _multiplies(node: gs.Node) -> bool:
    bodies = [b for v in node.attrs.values() if isinstance(v, gs.Graph) for b in subgraphs(v)]
    inner = {n.op for b in bodies for n in b.nodes}
    return bool(({node.op} | inner) & (OPERANDS.keys() | UNCOUNTED | RECURRENT))


class _Bits:
    """How many bits a tensor's values have."""

    def __init__(self, graph: gs.Graph, recorded: Mapping[str, int] | None = None) -> None:
        self._recorded = recorded_bits(graph) if recorded is None else recorded
        self._weights: dict[str, int] = {}
        for node in graph.nodes:
            self._note_constant(node)

    def inside(self, body: gs.Graph) -> _Bits:
        """The same for the body of a node."""
        return _Bits(body, self._recorded)

    def of(self, node: gs.Node, index: int) -> int:
        """Of input `index`, if constant, the bits recorded for it; else those of its type."""
        tensor = node.inputs[index]
        if bits := self._constant_bits(tensor) or self._renamed_bits(node, index):
            return bits
        maker = producer(tensor)
        while maker is not None and maker.op in MOVES:
            tensor = maker.inputs[0]
            maker = producer(tensor)
        return self._constant_bits(tensor) or type_bits(tensor.dtype)

    def _renamed_bits(self, node: gs.Node, index: int) -> int:
        """Of the weight of an integer-only graph, whose name is new: the width its values need.

        Every width recorded for the model is tried, the smallest first; 0 where none is recorded.
        A scale that is chosen per channel lets weights use all of their grid.
        """
        values, offset = constant(node, index), constant(node, index + 2)
        if node.op not in {"ConvInteger", "MatMulInteger"} or values is None:
            return 0
        zero_point = 0 if offset is None else int(offset.flat[0])
        largest = int(np.abs(values.astype(np.int64) - zero_point).max(initial=0))
        widths = {*self._recorded.values()}
        return min((bits for bits in widths if largest < 1 << (bits - 1)), default=0)

    def _note_constant(self, node: gs.Node) -> None:
        """A constant made from recorded ones, by unpacking or a table, keeps their bits."""
        inputs = [t for t in node.inputs if t.name]
        if all(isinstance(t, gs.Constant) or t.name in self._weights for t in inputs):
            bits = max((self._constant_bits(t) for t in inputs), default=0)
            self._weights |= {t.name: self._recorded.get(t.name, bits) for t in node.outputs}

    def _constant_bits(self, tensor: gs.Tensor) -> int:
        return self._recorded.get(tensor.name, 0) or self._weights.get(tensor.name, 0)


def recorded_bits(graph: gs.Graph) -> dict[str, int]:
    """The metadata `BITS_KEY`: a weight tensor's name to the bits of its grid or codebook.

    Raises:
        IntqError: It is no such object.
    """
    text = metadata(graph).get(BITS_KEY, "{}")
    try:
        return {str(name): int(bits) for name, bits in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise IntqError(
            f"metadata {BITS_KEY} holds {text[:40]!r}; expected JSON, weight names to bits; "
            "quantize the model again"
        ) from error


def type_bits(dtype: npt.DTypeLike | int | None) -> int:
    """The width of a NumPy, ml_dtypes or ONNX type, also below a byte; 32 where it is unknown."""
    if dtype is None:
        return 32
    if isinstance(dtype, int):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    found = re.search(r"\d+", np.dtype(dtype).name)
    return int(found.group()) if found else 8


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    tensors = [t for sub in subgraphs(graph) for t in sub.tensors().values()]
    yield from {id(t): t for t in tensors if isinstance(t, gs.Constant)}.values()


def _parameters(graph: gs.Graph) -> Iterator[gs.Constant]:
    scales = {
        node.inputs[index].name
        for sub in subgraphs(graph)
        for node in sub.nodes
        for index in SCALES.get(node.op, ())
        if index < len(node.inputs)
    }
    for tensor in _constants(graph):
        if tensor.name not in scales and np.dtype(tensor.values.dtype).name not in {
            "int64",
            "bool",
        }:
            yield tensor


def _stored_bytes(tensor: gs.Constant) -> int:
    values: npt.NDArray[np.generic] = tensor.values
    return math.ceil(values.size * type_bits(values.dtype) / 8)
