"""Operators that together are one function, so that no grid is put between them."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_intq.graph import producer, sole_consumer
from onnx_intq.qdq import QUANTIZE, dequantizer, quantizer


def gate(node: gs.Node) -> gs.Node | None:
    """The Sigmoid of `node`, if that is a product a * Sigmoid(b) and nothing else reads it."""
    if node.op != "Mul" or any(isinstance(t, gs.Constant) for t in node.inputs):
        return None
    makers = [producer(t) for t in node.inputs if len(t.outputs) == 1]
    return next((m for m in makers if m is not None and m.op == "Sigmoid"), None)


def swish(node: gs.Node) -> gs.Node | None:
    """The `gate` of `node`, if that is the product x * Sigmoid(x)."""
    found = gate(node)
    return found if found is not None and _same(*arguments(node)) else None


def gates(node: gs.Node, graph: gs.Graph) -> bool:
    """Whether `node` is the `gate` of a product, and no output of the graph."""
    reader = sole_consumer(graph, node.outputs[0]) if node.op == "Sigmoid" else None
    return reader is not None and gate(reader) is node


def gates_itself(node: gs.Node, graph: gs.Graph) -> bool:
    """Whether `node` is the Sigmoid of a `swish`, and no output of the graph."""
    return gates(node, graph) and swish(node.outputs[0].outputs[0]) is not None


def arguments(node: gs.Node) -> list[gs.Tensor]:
    """What a function is of: the inputs of its node; of a gated product, a and b."""
    found = gate(node)
    if found is None:
        return list(node.inputs)
    return [*(t for t in node.inputs if producer(t) is not found), found.inputs[0]]


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
