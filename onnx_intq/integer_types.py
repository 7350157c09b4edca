"""Chooses the integer type of quantized activations: one that is multiplied fast, or exactly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq import qdq
from onnx_intq.graph import Names
from onnx_intq.grid import Grid
from onnx_intq.lowering import Operand, parameters
from onnx_intq.moving import carries
from onnx_intq.placement import WEIGHTED


def shift_to_fast_type(model: gs.Graph, quantizer: gs.Node, names: Names, *, signed: bool) -> None:
    """Shift a pair's grid to the type its readers multiply fast; the values stay the same.

    Args:
        model: The pair's graph.
        quantizer: The pair's QuantizeLinear.
        names: In use; takes the new ones.
        signed: Whether 8-bit activations become int8, but on the left of matrix products.
    """
    q = quantizer.outputs[0]
    found = parameters(quantizer, q)
    if found is None or not _is_private(model, q, found):
        return
    wanted = found.grid.bits > 8 or (signed and not _only_left_of_products(q))
    if wanted == found.grid.signed:
        return
    grid = Grid(found.grid.bits, signed=wanted)
    zero_point = np.asarray(found.zero_point + grid.low - found.grid.low, grid.dtype)
    shifted = gs.Constant(names.new(f"{q.name}_zero_point"), zero_point)
    scale = quantizer.inputs[1]
    quantizer.attrs.pop("output_dtype", None)
    for node in (quantizer, *q.outputs):
        node.inputs = [node.inputs[0], scale, shifted]
    q.dtype = grid.dtype


def _is_private(model: gs.Graph, q: gs.Tensor, grid: Operand) -> bool:
    """Whether only the DequantizeLinear nodes of one pair know a quantized tensor's type."""
    if any(q is t for t in model.outputs):
        return False
    return all(
        node.op == qdq.DEQUANTIZE
        and (read := parameters(node, q)) is not None
        and read.same_grid(grid)
        for node in q.outputs
    )


def _only_left_of_products(q: gs.Tensor) -> bool:
    found = list(_uses(q))
    return bool(found) and all(
        n.op in {"MatMul", "Gemm", "LSTM"} and index == 0 for n, index in found
    )


def _uses(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, int]]:
    """Who multiplies a tensor, and as which input: behind Q, DQ and nodes that move values."""
    for node in tensor.outputs:
        if node.op in qdq.QDQ or carries(node, tensor):
            for output in node.outputs:
                yield from _uses(output)
        elif node.op in WEIGHTED or node.op == "LSTM":
            yield node, next(i for i, t in enumerate(node.inputs) if t is tensor)
