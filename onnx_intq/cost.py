"""What a model costs: parameters, bytes, multiply-accumulates and bit operations.

A multiply-accumulate of an a-bit and a b-bit number counts a * b bit operations (BOPs: van Baalen
et al., Bayesian Bits, 2020; Q-ASR, table 1), one of floats 32 * 32.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnx_intq.graph import metadata, producer, subgraphs
from onnx_intq.shapes import Shape, infer, input_shapes
from onnx_intq.transform import IntqError

BITS_KEY = "onnx_intq.bits"
"""Metadata key of a JSON object: weight tensor's name to the bits of the grid it lies on."""
OPERANDS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), (0, 1)),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), (0, 1)),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul"), (0, 3)),
}
"""Operators that are counted, with the numbers of the two inputs they multiply."""
UNCOUNTED = {"LSTM", "GRU", "RNN", "Einsum", "Attention", "DeformConv"}
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
    """One node: multiply-accumulates, and the bits of the two numbers it multiplies."""

    name: str
    op: str
    macs: int
    bits: tuple[int, int]

    @property
    def bops(self) -> int:
        """Bit operations."""
        return self.macs * math.prod(self.bits)


@dataclass(frozen=True, kw_only=True)
class Total:
    """What several nodes of one operator type cost together."""

    nodes: int
    macs: int
    bops: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs for inputs of given shapes.

    Attributes:
        parameters: Values of all floating-point and quantized constants, without scales and zero
            points.
        weight_bytes: Bytes of all constants as stored, sub-byte types packed.
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
            totals[op] = Total(nodes=len(nodes), macs=macs, bops=bops)
        return dict(sorted(totals.items(), key=lambda item: (-item[1].bops, item[0])))


def cost(
    graph: gs.Graph, *, seconds: float = 10.0, shapes: Mapping[str, Sequence[int]] | None = None
) -> Cost:
    """Count what one run of `graph` costs: float, QDQ and integer-only graphs alike.

    Args:
        graph: Not changed.
        seconds: Length of the audio; frames per second as the model's metadata says, else 100.
        shapes: Shapes of inputs, instead.

    Raises:
        IntqError: The shapes do not fit the inputs, or `seconds` is not positive.
    """
    inputs = input_shapes(graph, seconds=seconds, shapes=shapes)
    known, bits = infer(graph, inputs), _Bits(graph)
    nodes, uncounted = list[NodeCost](), list[str]()
    for node in graph.nodes:
        macs = _macs(node, known)
        if node.op in OPERANDS and macs is not None:
            a, b = (bits.of(node.inputs[i]) for i in OPERANDS[node.op])
            nodes.append(NodeCost(name=node.name, op=node.op, macs=macs, bits=(a, b)))
        elif _multiplies(node):
            uncounted.append(node.name)
    return Cost(
        parameters=sum(t.values.size for t in _parameters(graph)),
        weight_bytes=sum(_stored_bytes(t) for t in _constants(graph)),
        inputs=inputs,
        nodes=tuple(nodes),
        uncounted=tuple(uncounted),
    )


def _macs(node: gs.Node, known: Mapping[str, Shape]) -> int | None:
    """None where a shape is unknown or the node is not counted."""
    if node.op not in OPERANDS:
        return None
    a, b = (known.get(node.inputs[i].name) for i in OPERANDS[node.op])
    out = known.get(node.outputs[0].name)
    if a is None or b is None or out is None:
        return None
    if node.op == "ConvTranspose":
        return math.prod(a) * math.prod(b[1:])
    if "Conv" in node.op:
        return math.prod(out) * math.prod(b[1:])
    return math.prod(out) * (a[0] if node.attrs.get("transA") else a[-1])


def _multiplies(node: gs.Node) -> bool:
    bodies = [b for v in node.attrs.values() if isinstance(v, gs.Graph) for b in subgraphs(v)]
    inner = {n.op for b in bodies for n in b.nodes}
    return bool(({node.op} | inner) & (OPERANDS.keys() | UNCOUNTED))


class _Bits:
    """How many bits a tensor's values have."""

    def __init__(self, graph: gs.Graph) -> None:
        self._recorded = _recorded_bits(graph)
        self._weights: dict[str, int] = {}
        for node in graph.nodes:
            self._note_constant(node)

    def of(self, tensor: gs.Tensor) -> int:
        """Of a constant, the bits recorded for it; else those of the type it is stored in."""
        if bits := self._constant_bits(tensor):
            return bits
        maker = producer(tensor)
        while maker is not None and maker.op in MOVES:
            tensor = maker.inputs[0]
            maker = producer(tensor)
        return self._constant_bits(tensor) or type_bits(tensor.dtype)

    def _note_constant(self, node: gs.Node) -> None:
        """A constant made from recorded ones, by unpacking or a table, keeps their bits."""
        inputs = [t for t in node.inputs if t.name]
        if all(isinstance(t, gs.Constant) or t.name in self._weights for t in inputs):
            bits = max((self._constant_bits(t) for t in inputs), default=0)
            self._weights |= {t.name: self._recorded.get(t.name, bits) for t in node.outputs}

    def _constant_bits(self, tensor: gs.Tensor) -> int:
        return self._recorded.get(tensor.name, 0) or self._weights.get(tensor.name, 0)


def _recorded_bits(graph: gs.Graph) -> dict[str, int]:
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
