"""Puts every float tensor between operators on an integer grid, so that each can be lowered alone.

Before: `y = LogSoftmax(DequantizeLinear(q))`, y a graph output.
After: `y = DequantizeLinear(QuantizeLinear(LogSoftmax(DequantizeLinear(q))))`, 16 bits.
Tensors that a Conv or a matrix product reads get 8 bits, all others 16; grids come from the
calibrated ranges, else from the ranges of the operands; what is quantized behind a move, before
it, too. 8-bit activations become uint8, or for
processors with VNNI what onnxruntime multiplies fastest. Operators that
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
from onnx_intq.composites import gates_itself
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
    recorded_grids,
)
from onnx_intq.moving import carries, common_grid, users
from onnx_intq.placement import WEIGHTED
from onnx_intq.products import check_cpu
from onnx_intq.result_ranges import masked_logits, result_range
from onnx_intq.transform import Context, Pass, Range

SOFTMAX = {"Softmax", "LogSoftmax"}
"""Their logits may be masked: moved so far down that nothing is left of them."""
OPSET = 21
"""Brought 16-bit QuantizeLinear."""
LARGEST = 1e38
"""Ranges end below: their scales are float32."""


@dataclass(frozen=True, kw_only=True)
class CompleteQdq(Pass):
    """Give every float result a QuantizeLinear.

    Attributes:
        cpu: "any" makes 8-bit activations uint8: products of uint8 are exact on every processor.
            "vnni" makes them int8 but on the left of matrix products, which onnxruntime multiplies
            faster with uint8 weights; x86 without VNNI saturates there, and is wrong.
    """

    cpu: str = "any"

    needs: ClassVar[frozenset[str]] = frozenset({"quantized"})
    gives: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Insert pairs and shift grids; return how many pairs were inserted."""
        check_cpu(self.cpu)
        convert_opset(model, OPSET)
        _store_weights(model)
        work, count = _Completion(model, ctx, signed=self.cpu == "vnni"), 0
        for quantizer in _quantizers(model):
            work.prefer_fast_type(quantizer)
        for tensor in list(model.inputs):
            count += work.complete(tensor, None)
        for node in list(model.nodes):
            if is_float(node):
                count += work.complete_result(node)
        _record(model)
        return count


class _Completion:
    """Inserts pairs behind tensors, nodes in topological order."""

    def __init__(self, model: gs.Graph, ctx: Context, *, signed: bool) -> None:
        self._model, self._ctx, self._names = model, ctx, Names(model)
        self._signed = signed
        self._own = {id(node) for node in model.nodes}

    def complete_result(self, node: gs.Node) -> int:
        """Insert pairs behind the results of `node`, unless the next operator fuses with it."""
        if len(fused(self._model, node)) > 1 or gates_itself(node, self._model):
            return 0
        return sum(self.complete(t, node) for t in node.outputs if t.dtype == np.float32)

    def complete(self, tensor: gs.Tensor, node: gs.Node | None) -> int:
        """Insert a pair unless `tensor` has one for all its readers; return how many."""
        # An output that is an input itself has a name that no node can make.
        is_output = node is not None and any(tensor is t for t in self._model.outputs)
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
                "expected a quantized or calibrated one; start from the float model",
            )
            return 0
        self._append(tensor, grid, is_output=is_output)
        return 1

    def _grid(self, tensor: gs.Tensor, node: gs.Node | None) -> Operand | None:
        known = (common_grid(node) if node is not None else None) or self._grid_behind(tensor)
        limits = self._limits(tensor, node)
        if known is not None or limits is None or not np.abs(limits).max() < LARGEST:
            return known
        weighted = any(n.op in WEIGHTED for n in users(tensor))
        grid = Grid(8 if weighted else 16, signed=False)
        scale, zero_point = affine(*limits, grid)
        return Operand(tensor=tensor, scale=float(scale), zero_point=zero_point, grid=grid)

    def _grid_behind(self, tensor: gs.Tensor) -> Operand | None:
        """The grid that all of a tensor's values end on, if they are but moved before.

        Rounding may come before a move, so the function stays as it is.
        """
        found, moved = [], [tensor]
        for values in moved:
            if any(values is t for t in self._model.outputs):
                return None
            for node in [n for n in values.outputs if n.op != "Shape"]:
                if node.op == qdq.QUANTIZE:
                    found.append(parameters(node, node.outputs[0]))
                elif carries(node, values):
                    moved += node.outputs
                else:
                    return None
        first = found[0] if found else None
        same = first is not None and all(g is not None and g.same_grid(first) for g in found)
        return first if same else None

    def _limits(self, tensor: gs.Tensor, node: gs.Node | None) -> Range | None:
        operands = [] if node is None else [_range_of(t) for t in node.inputs]
        read = {n.op for n in users(tensor)}
        if node is not None and node.op == "Where" and read and read <= SOFTMAX:
            masked = masked_logits(operands[1:])
            if masked is not None:
                return masked
        derived = None if node is None else result_range(node, operands)
        if derived is not None and node is not None and node.op == "LogSoftmax":
            return derived  # narrow enough for 16 bits, and nothing unlikely is cut off
        return self._ctx.ranges.get(tensor.name) or derived

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
        pair = [quantizer, gs.Node(qdq.DEQUANTIZE, dq.name, {}, [q, *values], [dq])]
        model.nodes += pair
        self._own |= set(map(id, pair))
        for reader in others:
            reader.inputs = [dq if t is tensor else t for t in reader.inputs]
        if is_output:
            model.outputs = [dq if t is tensor else t for t in model.outputs]
            tensor.name, dq.name = self._names.new(f"{name}_float"), name
        self.prefer_fast_type(quantizer)

    def prefer_fast_type(self, quantizer: gs.Node) -> None:
        """Shift a pair's grid to the type its readers multiply fast; the values stay the same."""
        q = quantizer.outputs[0]
        found = parameters(quantizer, q)
        if found is None or not self._is_private(q, found):
            return
        signed = found.grid.bits > 8 or (self._signed and not _only_left_of_products(q))
        if signed == found.grid.signed:
            return
        grid = Grid(found.grid.bits, signed=signed)
        zero_point = np.asarray(found.zero_point + grid.low - found.grid.low, grid.dtype)
        shifted = gs.Constant(self._names.new(f"{q.name}_zero_point"), zero_point)
        scale = quantizer.inputs[1]
        quantizer.attrs.pop("output_dtype", None)
        for node in (quantizer, *q.outputs):
            node.inputs = [node.inputs[0], scale, shifted]
        q.dtype = grid.dtype

    def _is_private(self, q: gs.Tensor, grid: Operand) -> bool:
        """Whether only the DequantizeLinear nodes of one pair know a quantized tensor's type."""
        if any(q is t for t in self._model.outputs):
            return False
        return all(
            node.op == qdq.DEQUANTIZE
            and id(node) in self._own
            and (read := parameters(node, q)) is not None
            and read.same_grid(grid)
            for node in q.outputs
        )


def _range_of(tensor: gs.Tensor, nodes: int = 2) -> Range | None:
    """The range of an operand, also where a bias Add or an activation runs in its operator."""
    maker, known = producer(tensor), operand(tensor)
    if known is not None and not isinstance(known.tensor, gs.Constant):
        return known.low, known.high
    values = constant_values(tensor)
    if values is not None:
        floats = values.dtype == np.float32 and values.size > 0
        return (float(values.min()), float(values.max())) if floats else None
    if maker is None or not nodes or maker.op in qdq.QDQ:
        return None
    return result_range(maker, [_range_of(t, nodes - 1) for t in maker.inputs])


def _store_weights(model: gs.Graph) -> None:
    """Store constants that a QuantizeLinear quantizes at run time as the integers they become."""
    gone = []
    for node in _quantizers(model):
        values, scale = constant(node, 0), qdq.scale(node)
        zero_point, dtype = qdq.zero_point(node), qdq.integer_type(node)
        flat = zero_point is None or len(np.unique(zero_point)) == 1
        flat = flat and not node.attrs.get("block_size", 0)
        if values is None or scale is None or dtype not in GRIDS or not flat:
            continue
        zero = 0 if zero_point is None else int(zero_point.flat[0])
        axis = node.attrs.get("axis", 1) % max(values.ndim, 1)
        shape = [-1 if i == axis else 1 for i in range(values.ndim)] if scale.size > 1 else ()
        # Divided in float32, as QuantizeLinear does it.
        integers = quantize(values / scale.reshape(shape), 1.0, zero, GRIDS[dtype])
        (output,) = node.outputs
        gone.append((node, output, integers))
    for node, output, integers in gone:
        remove(model, [node])
        output.to_constant(integers)


def _quantizers(model: gs.Graph) -> list[gs.Node]:
    """The QuantizeLinear nodes of the graph itself; in bodies, nothing is lowered."""
    return [node for node in model.nodes if node.op == qdq.QUANTIZE]


def _only_left_of_products(q: gs.Tensor) -> bool:
    found = list(_uses(q))
    return bool(found) and all(n.op in {"MatMul", "Gemm"} and index == 0 for n, index in found)


def _uses(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, int]]:
    """Who multiplies a tensor, and as which input: behind Q, DQ and nodes that move values."""
    for node in tensor.outputs:
        if node.op in qdq.QDQ or carries(node, tensor):
            for output in node.outputs:
                yield from _uses(output)
        elif node.op in WEIGHTED:
            yield node, next(i for i, t in enumerate(node.inputs) if t is tensor)


def _record(model: gs.Graph) -> None:
    """Note what every integer tensor means, for `compare` and for runtimes without Q/DQ."""
    outputs = {id(t) for t in model.outputs}
    known = model.tensors()
    grids = {name: grid for name, grid in recorded_grids(metadata(model)).items() if name in known}
    for quantizer in _quantizers(model):
        q = quantizer.outputs[0]
        found = parameters(quantizer, q)
        results = [n.outputs[0] for n in q.outputs if n.op == qdq.DEQUANTIZE]
        named = [t.name for t in results if id(t) in outputs] or [quantizer.inputs[0].name]
        if found is not None:
            grids[q.name] = named[0], found.scale, found.zero_point
    metadata(model)[GRIDS_KEY] = json.dumps(grids)
