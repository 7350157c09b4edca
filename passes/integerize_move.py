"""Lets operators that move values, or choose among them, work on the integers.

Before: `q = QuantizeLinear(Concat(DequantizeLinear(x), DequantizeLinear(y)))`.
After: `q = Concat(x, requantize(y))`, all integers.
Moving: Transpose, Slice, Gather, Pad, Split, ...; choosing: MaxPool, ReduceMax, Max, Where, ...
Inputs whose grid is the result's are taken as they are, others requantised, constants rounded to
it. Operators that onnxruntime has not for 16 bits run in int32; MaxPool is then built of slices.
Shape and Size ask the integers.
Condition: what pads and where to move it is not computed from floats.
Law: every element equals `grid.requantize` of the element the operator would have moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.lowering import CannotLowerError, Site, is_float, lower
from onnx_intq.moving import JOINING, constant_on, places, regrid
from onnx_intq.placement import MOVING
from onnx_intq.pooling import taps, window
from onnx_intq.qdq import dequantizer, has_input
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass

GROWING = {"Pad", "Expand", "Tile"}
"""Operators whose results are larger than their inputs: these are requantised before."""
NOT_FOR_16_BITS = {"Pad", "Where", "Max", "Min", "ReduceMax", "ReduceMin", "GlobalMaxPool"}
"""Operators that onnxruntime 1.31 has for int8 and int32, and not for int16."""
ONLY_FOR_8_BITS = {"DepthToSpace", "SpaceToDepth"}
MEASURING = {"Shape", "Size"}


@dataclass(frozen=True, kw_only=True)
class IntegerizeMove(Pass):
    """Lower operators that move values."""

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        measured = sum(_measure(node, ctx) for node in model.nodes if node.op in MEASURING)
        return measured + lower(model, ctx, MOVING | set(JOINING), _Move().emit)


def _measure(node: gs.Node, ctx: Context) -> bool:
    """Let a node that asks for a size ask the integers, which have the same."""
    if not is_float(node):
        return False
    maker = dequantizer(node.inputs[0])
    if maker is None:
        ctx.remain(node, "it asks for the size of a float tensor; run complete_qdq before")
        return False
    node.inputs[0] = maker.inputs[0]
    return True


@dataclass(frozen=True)
class _Move:
    """Emits the nodes of one place.

    Attributes:
        splits: id of a Split -> its integer outputs, of which each place takes one.
    """

    splits: dict[int, list[gs.Variable]] = field(default_factory=dict)

    def emit(self, site: Site, builder: Builder) -> gs.Tensor:
        node, result, (first, *others) = site.node, site.result, places(site.node)
        x = site.operand(first) if site.values(first) is None else None
        if x is None or others or node.op in GROWING or x.grid.bits > result.grid.bits:
            values = {i: _on_result(site, builder, i) for i in (first, *others)}
            return self._moved(site, builder, values)
        moved = replace(x, tensor=self._moved(site, builder, {first: x.stored(builder)}))
        return regrid(moved, result, builder, site.first, site.last).tensor

    def _moved(self, site: Site, builder: Builder, values: Mapping[int, Value]) -> gs.Tensor:
        """The node on integers in place of the inputs `values`; of the same type as these."""
        node, some = site.node, next(iter(values.values()))
        wide, work = some.dtype.itemsize > 1, some.dtype
        if wide and node.op in ONLY_FOR_8_BITS:
            raise CannotLowerError(f"onnxruntime has no {node.op} for 16 bits")
        if wide and node.op == "MaxPool":
            return _pooled(some, node).astype(some.dtype)
        if wide and node.op in NOT_FOR_16_BITS:
            work = np.dtype(np.int32)
        inputs = [_as(values[i], work) if i in values else t for i, t in enumerate(node.inputs)]
        op, attrs, shape = node.op, dict(node.attrs), node.outputs[site.index].shape
        if op == "Split":
            return self._split(site, builder, inputs)
        if op == "Pad":
            inputs[2:3] = [_padding(site, builder, work)]
        if op == "GlobalMaxPool":
            op, attrs = "ReduceMax", {"keepdims": 1}
            inputs.append(builder.constant(_spatial_axes(node.inputs[0]), np.int64))
        tensor = builder.node(op, inputs, work, shape, **attrs)
        return builder.value(tensor, some.low, some.high).astype(some.dtype)

    def _split(self, site: Site, builder: Builder, inputs: list[gs.Tensor]) -> gs.Tensor:
        """One of the outputs; the first place that asks appends the node with all of them."""
        node = site.node
        if id(node) not in self.splits:
            dtype, shapes = inputs[0].dtype, [t.shape for t in node.outputs]
            first = builder.node("Split", inputs, dtype, shapes[0], **node.attrs)
            rest = [gs.Variable(builder.names.number("t"), dtype, s) for s in shapes[1:]]
            first.inputs[0].outputs += rest
            self.splits[id(node)] = [first, *rest]
        return self.splits[id(node)][site.index]


def _on_result(site: Site, builder: Builder, index: int) -> Value:
    """Input `index` on the grid of the result, within its limits."""
    values, limits = site.values(index), (site.first, site.last)
    if values is None:
        return regrid(site.operand(index), site.result, builder, *limits)
    return builder.value(constant_on(values, site.result, builder, *limits), *limits)


def _as(value: Value, dtype: np.dtype[Any]) -> gs.Tensor:
    """Cast, unless a constant can be stored in that type."""
    if isinstance(value.tensor, gs.Constant):
        return value.builder.constant(value.tensor.values, dtype)
    return value.astype(dtype)


def _pooled(x: Value, node: gs.Node) -> Value:
    """MaxPool in int32; its padding never is the largest."""
    slices: list[Any] = [*taps(x, window(node), x.low, node.outputs[0].shape)]
    pooled: Any = slices[0]
    for other in slices[1:]:
        pooled = np.maximum(pooled, other)
    found: Value = pooled
    return found


def _padding(site: Site, builder: Builder, dtype: np.dtype[Any]) -> gs.Tensor:
    """What Pad fills in: the integer of its constant, of real 0 by default."""
    if site.node.attrs.get("mode", "constant") != "constant":
        return gs.Variable.empty()
    given = has_input(site.node, 2)
    values = site.values(2) if given else np.zeros(())
    if values is None:
        raise CannotLowerError("what it pads with is computed at run time")
    stored = constant_on(values.reshape(()), site.result, builder, site.first, site.last)
    return builder.constant(stored.values, dtype)


def _spatial_axes(tensor: gs.Tensor) -> list[int]:
    if tensor.shape is None:
        raise CannotLowerError(f"the rank of its input {tensor.name!r} is unknown")
    return list(range(2, len(tensor.shape)))
