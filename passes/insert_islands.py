"""Quantizes what nonlinear functions read, for target tensorrt: they become islands of int32.

Before: `y = DequantizeLinear(QuantizeLinear(Sigmoid(Conv(..))))`, so far as `insert_qdq` goes.
After: `y = DequantizeLinear(QuantizeLinear(Sigmoid(DequantizeLinear(QuantizeLinear(Conv(..))))))`,
which `integerize_nonlinear(target='tensorrt')` turns into Cast, int32 arithmetic, Clip and Cast.
Condition: the result is quantized anyway, and the input comes from an operator that runs on int8,
where rounding it costs little. TensorRT takes no 16-bit Q/DQ, and 8 bits are coarse for the logits
of a softmax and the sums that a LayerNormalization reads: these stay float unless `rows` is set.
Law: a quantized tensor moves by at most half a step where it lies inside its range.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.composites import arguments, gate, gates
from onnx_intq.graph import Names, convert_opset, sole_consumer
from onnx_intq.grid import Grid, symmetric
from onnx_intq.lowering import constant_values, fused, operand
from onnx_intq.pairs import append_pair, let_read
from onnx_intq.placement import CANDIDATES, MOVING, SENSITIVE, computer
from onnx_intq.qdq import QUANTIZE, dequantizer
from onnx_intq.scalar_functions import UNARY
from onnx_intq.transform import Context, Pass

FUNCTIONS = UNARY - SENSITIVE
ROWS = frozenset({"Softmax", "LogSoftmax", "LayerNormalization"})
ROWS_OPSET = 18
"""Brought the axes of ReduceMax as an input."""
GRID = Grid(8, signed=True)


@dataclass(frozen=True, kw_only=True)
class InsertIslands(Pass):
    """Quantize the inputs of nonlinear functions.

    Attributes:
        rows: Those of Softmax, LogSoftmax and LayerNormalization, too.
        keep: Glob patterns of nodes that stay float.
    """

    rows: bool = False
    keep: tuple[str, ...] = ()

    operators: ClassVar[frozenset[str]] = FUNCTIONS | ROWS | {"Mul"}
    needs: ClassVar[frozenset[str]] = frozenset({"calibrated", "quantized"})
    gives: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Insert pairs; return how many functions read one."""
        if self.rows and any(node.op in ROWS for node in model.nodes):
            convert_opset(model, ROWS_OPSET)
        chosen = []
        for node in model.nodes:
            if not _is_function(node, model) or _makes_outputs(node, model):
                continue
            if why := self._reason_against(node, model, ctx):
                ctx.skip(node, why)
            else:
                chosen.append(node)
        names = Names(model)
        return sum([_quantize_inputs(node, model, ctx, names) for node in chosen])

    def _reason_against(self, node: gs.Node, model: gs.Graph, ctx: Context) -> str:
        """Why `node` stays float, "" if it need not."""
        inputs = _computed(node)
        if any(fnmatchcase(node.name, pattern) for pattern in self.keep):
            return "kept float by request"
        if node.op in ROWS and not self.rows:
            return "8 bits are too coarse for what it reads, and TensorRT takes no 16-bit Q/DQ"
        reader = sole_consumer(model, fused(model, node)[-1].outputs[0])
        if reader is None or reader.op != QUANTIZE:
            return "its result is read in float"
        if node.op not in ROWS and not all(map(_runs_on_int8, inputs)):
            return "its input is made by an operator that stays float"
        if any(dequantizer(t) is None and t.name not in ctx.ranges for t in inputs):
            return "its input has no range"
        return ""


def _is_function(node: gs.Node, model: gs.Graph) -> bool:
    known = node.op in FUNCTIONS | ROWS or gate(node) is not None
    return known and not gates(node, model) and bool(_computed(node))


def _computed(node: gs.Node) -> list[gs.Tensor]:
    """The tensors that a function is of, each once, without constants."""
    found = [t for t in arguments(node) if not t.is_empty() and constant_values(t) is None]
    return list({id(t): t for t in found}.values())


def _makes_outputs(node: gs.Node, model: gs.Graph) -> bool:
    """Whether a result is for the outputs of the graph alone: they stay float, as it is said."""
    outputs, made = {id(t) for t in model.outputs}, list(node.outputs)
    for tensor in made:
        if any(reader.op not in MOVING for reader in tensor.outputs):
            return False
        made += [t for reader in tensor.outputs for t in reader.outputs]
    return any(id(t) in outputs for t in made)


def _runs_on_int8(tensor: gs.Tensor) -> bool:
    """Whether a tensor is quantized, or made by an operator that reads a quantized one."""
    maker = computer(tensor, MOVING)
    if dequantizer(tensor) is not None or maker is None:
        return maker is not None
    quantized = any(dequantizer(t, moved=True) is not None for t in maker.inputs)
    return maker.op in CANDIDATES and quantized


def _quantize_inputs(node: gs.Node, model: gs.Graph, ctx: Context, names: Names) -> bool:
    """Let `node` read pairs; whether it did not before."""
    readers = [node] if (found := gate(node)) is None else [node, found]
    inputs = [t for t in _computed(node) if dequantizer(t) is None]
    for tensor in inputs:
        let_read(readers, tensor, _quantized(tensor) or _append(model, tensor, ctx, names))
    return bool(inputs)


def _quantized(tensor: gs.Tensor) -> gs.Tensor | None:
    """The result of the pair that another reader of `tensor` has already."""
    quantizers = [node for node in tensor.outputs if node.op == QUANTIZE]
    found = [node.outputs[0] for q in quantizers for node in q.outputs[0].outputs]
    return next((t for t in found if operand(t) is not None), None)


def _append(model: gs.Graph, tensor: gs.Tensor, ctx: Context, names: Names) -> gs.Tensor:
    scale, zero_point = symmetric(*ctx.ranges[tensor.name], GRID)
    _, dequantize = append_pair(model, tensor, scale, zero_point, np.int8, names)
    result: gs.Tensor = dequantize.outputs[0]
    return result
