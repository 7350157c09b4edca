"""Masks the rows of attention's result in place of the softmax before it.

Before: `y = MatMul(Where(m, 0, Softmax(Where(m, -10000, s))), v)`.
After: `y = Where(all(m), 0, MatMul(Softmax(Where(m, -10000, s)), v))`, all(m) over the last axis.
What m masks has no part in a softmax whose row has anything else, so the second Where is for rows
that are masked as a whole; it moves from a matrix of all pairs of frames behind the product, and
softmax and product are neighbours, which can be integers without a rounding between them. NeMo
writes attention so.
Condition: both masks are the same, by the nodes that make them; the lower constant is -1000 or
less, so that its exponential is 0 in float32 beside scores up to 890.
Law: outputs do not change, for such scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, constant, convert_opset, producer, sole_consumer
from onnx_intq.transform import Context, Pass

FAR_BELOW = -1000.0
OPSET = 18
"""Gave ReduceMin its axes as an input."""
ONNX_INT32, ONNX_BOOL = 6, 9


@dataclass(frozen=True, kw_only=True)
class MoveMask(Pass):
    """Move masks behind the product with softmax's result."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Move; return how many masks were."""
        if any(n.op == "MatMul" and _masked(n.inputs[0]) for n in model.nodes):
            convert_opset(model, OPSET)
        found = []
        for product in [n for n in model.nodes if n.op == "MatMul"]:
            mask = _masked(product.inputs[0])
            if mask is None:
                continue
            why = _obstacle(model, mask)
            if why:
                ctx.skip(product, why)
            else:
                found.append((product, mask))
        if found:
            names = Names(model)
            for product, mask in found:
                _move(model, product, mask, names)
            model.cleanup(remove_unused_graph_inputs=False)
        return len(found)


def _masked(tensor: gs.Tensor) -> gs.Node | None:
    """The Where that puts zeros into a softmax's result, if one makes `tensor`."""
    node = producer(tensor)
    if node is None or node.op != "Where" or _scalar(node, 1) != 0.0:
        return None
    softmax = producer(node.inputs[2])
    return node if softmax is not None and softmax.op == "Softmax" else None


def _scalar(node: gs.Node, index: int) -> float | None:
    values = constant(node, index)
    return None if values is None or values.size != 1 else float(values.reshape(()))


def _obstacle(model: gs.Graph, mask: gs.Node) -> str:
    """Why a mask cannot move, "" if it can."""
    if sole_consumer(model, mask.outputs[0]) is None:
        return "what it masks is read elsewhere too"
    softmax = producer(mask.inputs[2])
    before = None if softmax is None else producer(softmax.inputs[0])
    if softmax is None or before is None or before.op != "Where":
        return "the softmax's logits are not masked"
    rank = len(softmax.inputs[0].shape or ())
    if softmax.attrs.get("axis", -1) not in {-1, rank - 1}:
        return "the softmax does not run over the last axis"
    low = _scalar(before, 1)
    if low is None or low > FAR_BELOW:
        return f"masked logits are not {FAR_BELOW:g} or less"
    return "" if _same(mask.inputs[0], before.inputs[0]) else "the logits have another mask"


def _same(a: gs.Tensor, b: gs.Tensor) -> bool:
    """Whether two tensors are one, or made of one by equal nodes, as exporters repeat them."""
    if a is b:
        return True
    first, second = producer(a), producer(b)
    if first is None or second is None:
        return _equal_constants(a, b)
    if (first.op, first.attrs) != (second.op, second.attrs):
        return False
    same_place = [t is a for t in first.outputs] == [t is b for t in second.outputs]
    inputs = zip(first.inputs, second.inputs, strict=False)
    counts = len(first.inputs) == len(second.inputs)
    return counts and same_place and all(_same(x, y) for x, y in inputs)


def _equal_constants(a: gs.Tensor, b: gs.Tensor) -> bool:
    if not (isinstance(a, gs.Constant) and isinstance(b, gs.Constant)):
        return False
    return a.values.dtype == b.values.dtype and np.array_equal(a.values, b.values)


def _move(model: gs.Graph, product: gs.Node, mask: gs.Node, names: Names) -> None:
    (result,), where = product.outputs, mask.inputs[0]
    axes = gs.Constant(names.new(f"{mask.name}_axes"), np.array([-1], np.int64))

    def append(op: str, inputs: list[gs.Tensor], dtype: type, **attrs: int) -> gs.Variable:
        name = names.new(f"{mask.outputs[0].name}_{op.lower()}")
        made.append(gs.Node(op, name, dict(attrs), inputs, [gs.Variable(name, dtype)]))
        return made[-1].outputs[0]

    made: list[gs.Node] = []
    numbers = append("Cast", [where], np.int32, to=ONNX_INT32)
    least = append("ReduceMin", [numbers, axes], np.int32, keepdims=1)
    rows = append("Cast", [least], np.bool_, to=ONNX_BOOL)
    full = gs.Variable(names.new(f"{result.name}_full"), np.float32, result.shape)
    product.inputs[0], product.outputs = mask.inputs[2], [full]
    masked = gs.Node("Where", mask.name, {}, [rows, mask.inputs[1], full], [result])
    place = model.nodes.index(product) + 1
    model.nodes[place:place] = [*made, masked]
