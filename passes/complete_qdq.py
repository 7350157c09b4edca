"""Puts every float tensor between operators on an integer grid, so that each can be lowered alone.

Before: `y = LogSoftmax(DequantizeLinear(q))`, y a graph output.
After: `y = DequantizeLinear(QuantizeLinear(LogSoftmax(DequantizeLinear(q))))`, 16 bits.
Tensors that a Conv or a matrix product reads get 8 bits, all others 16; grids come from the
calibrated ranges, else from the ranges of the operands; what is quantized behind a move, before
it, too. 8-bit activations become uint8, or for processors with VNNI what onnxruntime multiplies
fastest. Operators that move values keep the grid of their input. An activation stays with the
operator before it.
Condition: the model has Q/DQ nodes, ours or another tool's.
Law: an 8-bit grid that was there means the same values afterwards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq import qdq
from onnx_intq.composites import gates_itself
from onnx_intq.graph import Names, convert_opset, metadata
from onnx_intq.grid import Grid, affine
from onnx_intq.integer_types import shift_to_fast_type
from onnx_intq.lowering import (
    GRIDS_KEY,
    Operand,
    fused,
    is_float,
    parameters,
    recorded_grids,
)
from onnx_intq.moving import carries, common_grid, users
from onnx_intq.pairs import append_pair, let_read, quantizers, store_constants
from onnx_intq.placement import WEIGHTED
from onnx_intq.products import check_cpu
from onnx_intq.recurrent_states import state_grids
from onnx_intq.result_ranges import masked_logits, range_of, result_range
from onnx_intq.transform import Context, Pass, Range

SOFTMAX = {"Softmax", "LogSoftmax"}
"""Their logits may be masked: moved so far down that nothing is left of them."""
MULTIPLYING = WEIGHTED | {"LSTM"}
"""Operators that multiply what they read by weights of 8 bits."""
OPSET = 21
"""Brought 16-bit QuantizeLinear."""
UNKNOWN = (
    "the range of its result {!r} is unknown; expected a quantized or calibrated one; "
    "give --data or --ranges, or start from the float model"
)
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
        model.cleanup(remove_unused_graph_inputs=False)  # what nobody reads, nobody need lower
        store_constants(model)
        work, count = _Completion(model, ctx, signed=self.cpu == "vnni"), 0
        for quantizer in quantizers(model):
            work.shift(quantizer)
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
        self._states = state_grids(model, ctx.limits)

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
            known = node or gs.Node("Input", tensor.name)
            self._ctx.remain(known, UNKNOWN.format(tensor.name))
            return 0
        self._append(tensor, grid, is_output=is_output)
        return 1

    def _grid(self, tensor: gs.Tensor, node: gs.Node | None) -> Operand | None:
        if id(tensor) in self._states:
            return self._states[id(tensor)]
        known = (common_grid(node) if node is not None else None) or self._grid_behind(tensor)
        bits = 8 if any(n.op in MULTIPLYING for n in users(tensor)) else 16
        limits = self._limits(tensor, node, bits)
        if known is not None or limits is None or not np.abs(limits).max() < LARGEST:
            return known
        grid = Grid(bits, signed=False)
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

    def _limits(self, tensor: gs.Tensor, node: gs.Node | None, bits: int) -> Range | None:
        operands = [] if node is None else [range_of(t) for t in node.inputs]
        read = {n.op for n in users(tensor)}
        if node is not None and node.op == "Where" and read and read <= SOFTMAX:
            masked = masked_logits(operands[1:])
            if masked is not None:
                return masked
        derived = None if node is None else result_range(node, operands)
        if derived is not None and node is not None and node.op == "LogSoftmax":
            return derived  # narrow enough for 16 bits, and nothing unlikely is cut off
        return self._ctx.limits(tensor.name, bits) or derived

    def _append(self, tensor: gs.Tensor, grid: Operand, *, is_output: bool) -> None:
        name, model, others = tensor.name, self._model, list(tensor.outputs)
        pair = append_pair(model, tensor, grid.scale, grid.zero_point, grid.grid.dtype, self._names)
        quantizer, dq = pair[0], pair[1].outputs[0]
        let_read(others, tensor, dq)
        if is_output:
            model.outputs = [dq if t is tensor else t for t in model.outputs]
            tensor.name, dq.name = self._names.new(f"{name}_float"), name
        self.shift(quantizer)

    def shift(self, quantizer: gs.Node) -> None:
        """Give a pair the type its readers multiply; a state has the same wherever it is."""
        if id(quantizer.inputs[0]) not in self._states:
            shift_to_fast_type(self._model, quantizer, self._names, signed=self._signed)


def _record(model: gs.Graph) -> None:
    """Note what every integer tensor means, for `compare` and for runtimes without Q/DQ."""
    outputs = {id(t) for t in model.outputs}
    known = model.tensors()
    grids = {name: grid for name, grid in recorded_grids(metadata(model)).items() if name in known}
    for quantizer in quantizers(model):
        q = quantizer.outputs[0]
        found = parameters(quantizer, q)
        results = [n.outputs[0] for n in q.outputs if n.op == qdq.DEQUANTIZE]
        named = [t.name for t in results if id(t) in outputs] or [quantizer.inputs[0].name]
        if found is not None:
            grids[q.name] = named[0], found.scale, found.zero_point
    metadata(model)[GRIDS_KEY] = json.dumps(grids)
