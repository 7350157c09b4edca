"""Operators that together are one function, so that no grid is put between them."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_intq.graph import producer, sole_consumer
from onnx_intq.qdq import QUANTIZE, dequantizer, quantizer


def swish(node: gs.Node) -> gs.Node | None:
    """The Sigmoid of `node`, if that is the product x * Sigmoid(x) and nothing else reads it."""
    if node.op != "Mul":
        return None
    for gate, x in (node.inputs, reversed(node.inputs)):
        maker = producer(gate)
        alone = maker is not None and maker.op == "Sigmoid" and len(gate.outputs) == 1
        if maker is not None and alone and _same(maker.inputs[0], x):
            return maker
    return None


def gates_itself(node: gs.Node, graph: gs.Graph) -> bool:
    """Whether `node` is the Sigmoid of a `swish`, and no output of the graph."""
    reader = sole_consumer(graph, node.outputs[0]) if node.op == "Sigmoid" else None
    return reader is not None and swish(reader) is node


def attention(product: gs.Node) -> gs.Node | None:
    """The Softmax of a MatMul that is softmax(scores) @ v, if nothing else reads the weights."""
    weights = product.inputs[0]
    while len(weights.outputs) == 1 and (maker := producer(weights)) is not None:
        if maker.op == "Softmax":
            return maker
        if maker.op != QUANTIZE and (maker is not dequantizer(weights) or quantizer(maker) is None):
            return None
        weights = maker.inputs[0]
    return None


def _same(a: gs.Tensor, b: gs.Tensor) -> bool:
    """Whether two tensors are one, or dequantize one tensor in the same way."""
    makers = dequantizer(a), dequantizer(b)
    if a is b or makers[0] is None or makers[1] is None:
        return a is b
    pairs = zip(makers[0].inputs, makers[1].inputs, strict=False)
    return all(x is y for x, y in pairs)
