"""Computes with integers what an exporter lets floats compute: the lengths of a padded batch.

Before: `y = Cast<int64>(Add(Floor(Div(Sub(Cast<float>(length), 1), 2)), 1))`.
After: `d = Sub(length, 1); y = Add(Div(Sub(d, Mod(d, 2)), 2), 1)`, all int64.
So for chains of Add, Sub, Mul and Div by scalar constants, Floor, and casts to integers and back,
as NeMo's convolutions write the number of frames behind them. Quantized, lengths would be rounded.
Condition: the chain begins with a Cast from int32 or int64 and ends with one to int64; its
constants are whole numbers, divisors positive; what is divided is rounded before it is added to.
Law: outputs do not change, for lengths below 2^24, which float32 counts exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, constant, producer
from onnx_intq.transform import Context, Pass

INTEGERS = {np.dtype(np.int32), np.dtype(np.int64)}
FLOATS = {np.dtype(np.float32), np.dtype(np.float64)}
ONNX_INT64 = 7
LINEAR = {"Add", "Sub", "Mul"}
"""Operators that make whole numbers of whole numbers."""


@dataclass(frozen=True, kw_only=True)
class FuseLengths(Pass):
    """Turn float arithmetic on integers into integer arithmetic."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Rewrite; return how many chains were."""
        names, count = Names(model), 0
        for last in [n for n in model.nodes if _ends(n)]:
            chain = _Chain(last, names)
            whole = chain.truncated(last.inputs[0])
            if whole is None:
                ctx.skip(last, "what it casts is no whole-number arithmetic on integers")
                continue
            place = model.nodes.index(last)
            model.nodes[place:place] = chain.nodes
            last.op, last.attrs, last.inputs = "Identity", {}, [whole]
            count += 1
        if count:
            model.cleanup(remove_unused_graph_inputs=False)
        return count


def _ends(node: gs.Node) -> bool:
    """Whether a node casts floats to int64."""
    return node.op == "Cast" and _type(node.inputs[0]) in FLOATS and _int64(node.outputs[0])


def _int64(tensor: gs.Tensor) -> bool:
    return _type(tensor) == np.int64


def _type(tensor: gs.Tensor) -> np.dtype[np.generic] | None:
    return None if tensor.dtype is None else np.dtype(tensor.dtype)


@dataclass
class _Chain:
    """Builds the integer nodes of one chain.

    Attributes:
        last: The node that ends it: gives names and shapes.
        names: Of the graph.
        nodes: What was built, in order.
    """

    last: gs.Node
    names: Names
    nodes: list[gs.Node] = field(default_factory=list)

    def truncated(self, tensor: gs.Tensor) -> gs.Tensor | None:
        """A float tensor cast to int64, which rounds toward 0, as the Div of integers does."""
        node = producer(tensor)
        divided = node is not None and node.op == "Div"
        return self._divided(node, floor=False) if node and divided else self.whole(tensor)

    def whole(self, tensor: gs.Tensor) -> gs.Tensor | None:
        """The int64 tensor of the same values, if they are whole."""
        node = producer(tensor)
        if node is None:
            return None
        if node.op == "Cast":
            return self._source(node.inputs[0])
        if node.op == "Floor":
            inner = producer(node.inputs[0])
            if inner is not None and inner.op == "Div":
                return self._divided(inner, floor=True)
            return self.whole(node.inputs[0])
        return self._linear(node) if node.op in LINEAR else None

    def _source(self, tensor: gs.Tensor) -> gs.Tensor | None:
        if _int64(tensor):
            return tensor
        return self._append("Cast", [tensor], to=ONNX_INT64) if _type(tensor) in INTEGERS else None

    def _linear(self, node: gs.Node) -> gs.Tensor | None:
        for index in range(2):
            scalar = _scalar(node, 1 - index)
            if scalar is None:
                continue
            inner, value = self.whole(node.inputs[index]), self._constant(scalar)
            if inner is None:
                return None
            return self._append(node.op, [inner, value] if index == 0 else [value, inner])
        return None

    def _divided(self, node: gs.Node, *, floor: bool) -> gs.Tensor | None:
        divisor, inner = _scalar(node, 1), self.whole(node.inputs[0])
        if divisor is None or inner is None or divisor <= 0:
            return None
        by = self._constant(divisor)
        if floor:
            inner = self._append("Sub", [inner, self._append("Mod", [inner, by])])
        return self._append("Div", [inner, by])

    def _constant(self, value: int) -> gs.Constant:
        name = self.names.new(f"{self.last.outputs[0].name}_constant")
        return gs.Constant(name, np.array(value, np.int64))

    def _append(self, op: str, inputs: list[gs.Tensor], **attrs: int) -> gs.Variable:
        name = self.names.new(f"{self.last.outputs[0].name}_{op.lower()}")
        result = gs.Variable(name, np.int64, self.last.outputs[0].shape)
        self.nodes.append(gs.Node(op, name, dict(attrs), inputs, [result]))
        return result


def _scalar(node: gs.Node, index: int) -> int | None:
    """A constant that is one whole number."""
    values = constant(node, index)
    if values is None or values.size != 1:
        return None
    scalar = float(values.reshape(()))
    return int(scalar) if scalar.is_integer() else None
