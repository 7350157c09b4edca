"""Puts every float tensor between operators on an integer grid, so that each can be lowered alone.

Before: `y = LogSoftmax(DequantizeLinear(q))`, y a graph output.
After: `y = DequantizeLinear(QuantizeLinear(LogSoftmax(DequantizeLinear(q))))`, 16 bits.
Tensors that a Conv or a matrix product reads get 8 bits, all others 16; grids come from the
calibrated ranges, else from the ranges of the operands. Quantized activations become int8, or
uint8 where a matrix product has them on its left: what onnxruntime multiplies fast. Operators that
move values keep the grid of their input. An activation stays with the operator before it.
Condition: the model has Q/DQ nodes, ours or another tool's.
Law: an 8-bit grid that was there means the same values afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq import qdq
from onnx_intq.graph import Names, constant, convert_opset, metadata, producer, remove
from onnx_intq.grid import Grid, affine, quantize
from onnx_intq.lowering import (
    GRIDS,
    GRIDS_KEY,
    Operand,
    constant_values,
    fused,
    is_float,
    operand,
    parameters,
    readers,
)
from onnx_intq.placement import MOVING, WEIGHTED
from onnx_intq.result_ranges import result_range
from onnx_intq.transform import Context, Pass, Range

OPSET = 21
"""Brought 16-bit QuantizeLinear."""


@dataclass(frozen=True, kw_only=True)
class CompleteQdq(Pass):
    """Give every float result a QuantizeLinear."""

    needs: ClassVar[frozenset[str]] = frozenset({"quantized"})
    gives: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Insert pairs and shift grids; return how many pairs were inserted."""
        convert_opset(model, OPSET)
        _store_weights(model)
        for quantizer in list(qdq.nodes(model, qdq.QUANTIZE)):
            _prefer_fast_type(quantizer)
        work, count = _Completion(model, ctx), 0
        for tensor in list(model.inputs):
            count += work.complete(tensor, None)
        for node in list(model.nodes):
            if is_float(node):
                count += work.complete_result(node)
        _record(model)
        return count


class _Completion:
    """Inserts pairs behind tensors, nodes in topological order."""

    def __init__(self, model: gs.Graph, ctx: Context) -> None:
        self._model, self._ctx, self._names = model, ctx, Names(model)

    def complete_result(self, node: gs.Node) -> int:
        """Insert pairs behind the results of `node`, unless the next operator fuses with it."""
        if len(fused(self._model, node)) > 1:
            return 0
        return sum(self.complete(t, node) for t in node.outputs if t.dtype == np.float32)

    def complete(self, tensor: gs.Tensor, node: gs.Node | None) -> int:
        """Insert a pair unless `tensor` has one for all its readers; return how many."""
        is_output = any(tensor is t for t in self._model.outputs)
        quantizers = [n for n in tensor.outputs if n.op == qdq.QUANTIZE]
        others = [n for n in tensor.outputs if n.op != qdq.QUANTIZE]
        if tensor.dtype != np.float32 or (len(quantizers) == 1 and not others and not is_output):
            return 0
        if not (tensor.outputs or is_output):
            return 0
        grid = self._grid(tensor, node)
        if grid is None:
            name = node or gs.Node("Input", tensor.name)
            self._ctx.remain(
                name,
                f"the range of its result {tensor.name!r} is unknown; "
                "calibrate the model: give --data or the float model",
            )
            return 0
        self._append(tensor, grid, is_output=is_output)
        return 1

    def _grid(self, tensor: gs.Tensor, node: gs.Node | None) -> Operand | None:
        if node is not None and node.op in MOVING:
            source = operand(node.inputs[0])
            if source is not None:
                return source
        limits = self._ctx.ranges.get(tensor.name) or self._derived(node)
        if limits is None:
            return None
        weighted = any(n.op in WEIGHTED for n in readers(tensor, MOVING))
        grid = Grid(8 if weighted else 16, signed=False)
        scale, zero_point = affine(*limits, grid)
        return Operand(tensor=tensor, scale=float(scale), zero_point=zero_point, grid=grid)

    def _derived(self, node: gs.Node | None) -> Range | None:
        if node is None:
            return None
        head = _head(node)
        found = result_range(head, [_range_of(t) for t in head.inputs])
        if head is not node and found is not None:
            found = result_range(node, [found])
        return found

    def _append(self, tensor: gs.Tensor, grid: Operand, *, is_output: bool) -> None:
        name, model = tensor.name, self._model
        dtype = grid.grid.dtype
        values = [
            gs.Constant(self._names.new(f"{name}_scale"), np.asarray(grid.scale, np.float32)),
            gs.Constant(self._names.new(f"{name}_zp"), np.asarray(grid.zero_point, dtype)),
        ]
        q = gs.Variable(self._names.new(f"{name}_q"), dtype=dtype, shape=tensor.shape)
        dq = gs.Variable(self._names.new(f"{name}_dq"), dtype=np.float32, shape=tensor.shape)
        others = list(tensor.outputs)
        quantizer = gs.Node(qdq.QUANTIZE, q.name, {}, [tensor, *values], [q])
        model.nodes += [quantizer, gs.Node(qdq.DEQUANTIZE, dq.name, {}, [q, *values], [dq])]
        for reader in others:
            reader.inputs = [dq if t is tensor else t for t in reader.inputs]
        if is_output:
            model.outputs = [dq if t is tensor else t for t in model.outputs]
            tensor.name, dq.name = self._names.new(f"{name}_float"), name
        _prefer_fast_type(quantizer)


def _head(node: gs.Node) -> gs.Node:
    """The operator that a bias Add or activation runs in, else the node itself."""
    maker = producer(node.inputs[0]) if node.op in {"Relu", "Clip", "Add"} else None
    while maker is not None and maker.op not in {qdq.QUANTIZE, qdq.DEQUANTIZE}:
        node, maker = maker, producer(maker.inputs[0]) if maker.op == "Add" else None
    return node


def _range_of(tensor: gs.Tensor) -> Range | None:
    known = operand(tensor)
    if known is not None and constant(producer(tensor), 0) is None:
        return known.low, known.high
    values = constant_values(tensor)
    if values is None or values.dtype != np.float32 or not values.size:
        return None
    return float(values.min()), float(values.max())


def _store_weights(model: gs.Graph) -> None:
    """Store constants that a QuantizeLinear quantizes at run time as the integers they become."""
    gone = []
    for node in qdq.nodes(model, qdq.QUANTIZE):
        values, scale = constant(node, 0), qdq.scale(node)
        zero_point, dtype = qdq.zero_point(node), qdq.integer_type(node)
        flat = zero_point is None or len(np.unique(zero_point)) == 1
        if values is None or scale is None or dtype not in GRIDS or not flat:
            continue
        zero = 0 if zero_point is None else int(zero_point.flat[0])
        axis = node.attrs.get("axis", 1) if scale.size > 1 else None
        integers = quantize(values, np.squeeze(scale), zero, GRIDS[dtype], axis)
        (output,) = node.outputs
        gone.append((node, output, integers))
    for node, output, integers in gone:
        remove(model, [node])
        output.to_constant(integers)


def _prefer_fast_type(quantizer: gs.Node) -> None:
    """Shift a pair's grid to the type its readers multiply fast; the values stay the same."""
    q = quantizer.outputs[0]
    found = parameters(quantizer, q)
    if found is None or any(n.op != qdq.DEQUANTIZE for n in q.outputs):
        return
    signed = not (found.grid.bits == 8 and _only_left_of_products(q))
    if signed == found.grid.signed:
        return
    grid = Grid(found.grid.bits, signed=signed)
    zero_point = found.zero_point + grid.low - found.grid.low
    shifted = gs.Constant(f"{q.name}_zero_point", np.asarray(zero_point, grid.dtype))
    scale = quantizer.inputs[1]
    for node in (quantizer, *q.outputs):
        node.inputs = [node.inputs[0], scale, shifted]
    q.dtype = grid.dtype


def _only_left_of_products(q: gs.Tensor) -> bool:
    found = list(_uses(q))
    return bool(found) and all(n.op in {"MatMul", "Gemm"} and index == 0 for n, index in found)


def _uses(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, int]]:
    """Who multiplies a tensor, and as which input: behind its DQ and nodes that move values."""
    for node in tensor.outputs:
        if node.op == qdq.DEQUANTIZE or node.op in MOVING:
            yield from _uses(node.outputs[0])
        elif node.op in WEIGHTED:
            yield node, next(i for i, t in enumerate(node.inputs) if t is tensor)


def _record(model: gs.Graph) -> None:
    """Note what every integer tensor means, for `compare` and for runtimes without Q/DQ."""
    outputs = {id(t) for t in model.outputs}
    grids: dict[str, tuple[str, float, int]] = {}
    for quantizer in qdq.nodes(model, qdq.QUANTIZE):
        q = quantizer.outputs[0]
        found = parameters(quantizer, q)
        results = [n.outputs[0] for n in q.outputs if n.op == qdq.DEQUANTIZE]
        named = [t.name for t in results if id(t) in outputs] or [quantizer.inputs[0].name]
        if found is not None:
            grids[q.name] = named[0], found.scale, found.zero_point
    metadata(model)[GRIDS_KEY] = json.dumps(grids)
