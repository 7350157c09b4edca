"""Leaves one QuantizeLinear per float input and one DequantizeLinear per float output, or none.

Before: pairs `DequantizeLinear(a) -> QuantizeLinear(b)` with different grids inside the graph.
After: integer requantisation in their place; pairs with one grid go. With io = 'int8' the boundary
nodes go, too: the model then takes and gives the integers themselves, and the metadata
(`onnx_intq.grids`) tells their scales and zero points. Operators that are still float are named.
Condition: scales and zero points are constant, one per tensor.
Law: with io = 'float' the outputs do not change but for the rounding half up of requantisation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnx_intq import qdq
from onnx_intq.graph import Names, metadata, producer, remove, replace_uses
from onnx_intq.grid import dyadic, requantize
from onnx_intq.lowering import (
    GRIDS_KEY,
    Operand,
    is_float,
    operand,
    parameters,
    recorded_grids,
)
from onnx_intq.trace import Builder
from onnx_intq.transform import Context, Pass, PassError


@dataclass(frozen=True, kw_only=True)
class IntegerizeBoundary(Pass):
    """Lower pairs inside the graph.

    Attributes:
        io: "float", or "int8" for a model that takes and gives integers.
    """

    io: str = "float"

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    gives: ClassVar[frozenset[str]] = frozenset({"integer"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many pairs and boundary nodes went."""
        if self.io not in {"float", "int8"}:
            raise PassError(f"io {self.io!r}; expected 'float' or 'int8'")
        quantizers = [node for node in model.nodes if node.op == qdq.QUANTIZE]
        count = sum(_lower_pair(model, quantizer) for quantizer in quantizers)
        model.cleanup(remove_unused_graph_inputs=False)
        if self.io == "int8":
            count += _open_inputs(model) + _open_outputs(model)
        _forget(model)
        known = {name for name, _ in ctx.remaining}
        for node in model.nodes:
            if is_float(node) and node.name not in known:
                ctx.remain(node, f"no pass makes integers of {node.op}")
        return count


def _lower_pair(model: gs.Graph, quantizer: gs.Node) -> bool:
    source = operand(quantizer.inputs[0])
    target = parameters(quantizer, quantizer.outputs[0])
    if source is None or target is None:
        return False
    old, name = quantizer.outputs[0], quantizer.outputs[0].name
    if not source.same_grid(target):
        new = _requantized(model, source, target)
    else:  # two graph outputs, or an input and an output, cannot be one tensor
        new = _copy(model, source.tensor, name) if _is_in(old, model.outputs) else source.tensor
    replace_uses(model, old, new)
    remove(model, [quantizer])
    if new is not source.tensor:
        new.name, old.name = name, f"{name}_replaced"
    return True


def _is_in(tensor: gs.Tensor, tensors: Iterable[gs.Tensor]) -> bool:
    return any(tensor is t for t in tensors)


def _copy(model: gs.Graph, tensor: gs.Tensor, name: str) -> gs.Tensor:
    """`tensor` once more, to become the output `name`."""
    builder = Builder(model, Names(model), {}, f"{name}_copy")
    copy = builder.node("Identity", [tensor], tensor.dtype, tensor.shape)
    grids = recorded_grids(metadata(model))
    if tensor.name in grids:
        metadata(model)[GRIDS_KEY] = json.dumps(grids | {copy.name: grids[tensor.name]})
    return copy


def _requantized(model: gs.Graph, source: Operand, target: Operand) -> gs.Tensor:
    builder = Builder(model, Names(model), {}, f"{target.tensor.name}_requantized")
    multiplier = dyadic(source.scale / target.scale, 62 - target.grid.bits)
    limits = {"zero_point": target.zero_point, "low": target.grid.low, "high": target.grid.high}
    result = requantize(source.centred(builder), multiplier, **limits)
    tensor: gs.Tensor = result.astype(target.grid.dtype)
    return tensor


def _open_inputs(model: gs.Graph) -> int:
    """Let the graph take integers: its inputs become what their QuantizeLinear gave."""
    count = 0
    for index, tensor in enumerate(model.inputs):
        quantizers = [n for n in tensor.outputs if n.op == qdq.QUANTIZE]
        if len(quantizers) != 1 or len(tensor.outputs) != 1:
            continue
        (integers,) = quantizers[0].outputs
        remove(model, quantizers)
        integers.shape = tensor.shape
        _rename(model, integers, tensor)
        model.inputs[index] = integers
        count += 1
    return count


def _open_outputs(model: gs.Graph) -> int:
    """Let the graph give integers."""
    count = 0
    for index, tensor in enumerate(model.outputs):
        maker = producer(tensor)
        if maker is None or maker.op != qdq.DEQUANTIZE or tensor.outputs:
            continue
        integers = maker.inputs[0]
        if producer(integers) is None or _is_in(integers, model.outputs):
            integers = _copy(model, integers, tensor.name)
        remove(model, [maker])
        integers.shape = tensor.shape
        _rename(model, integers, tensor)
        model.outputs[index] = integers
        count += 1
    return count


def _rename(model: gs.Graph, integers: gs.Tensor, tensor: gs.Tensor) -> None:
    """Let the integers bear the name that users know."""
    grids = recorded_grids(metadata(model))
    if integers.name in grids:
        grids[tensor.name] = grids.pop(integers.name)
        metadata(model)[GRIDS_KEY] = json.dumps(grids)
    integers.name, tensor.name = tensor.name, f"{tensor.name}_float"


def _forget(model: gs.Graph) -> None:
    """Take tensors that are gone out of the metadata."""
    known = model.tensors()
    grids = recorded_grids(metadata(model))
    kept = {name: grid for name, grid in grids.items() if name in known}
    metadata(model)[GRIDS_KEY] = json.dumps(kept)
