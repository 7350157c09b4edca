"""Stores float tables that are quantized where they are read, as the integers they become.

Before: `q = QuantizeLinear(Slice(table, ...), s, z)`.
After: `q = QuantizeLinear(Slice(DequantizeLinear(stored, s, z), ...), s, z)`, stored in 8 bits.
So for the sines and cosines of a Conformer's positions: as large as a layer, and four times that in
float32.
Condition: from table to QuantizeLinear values are but moved; nothing else reads them; one scale.
Law: the quantized tensor does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, producer
from onnx_intq.grid import quantize
from onnx_intq.lowering import parameters
from onnx_intq.pairs import quantizers
from onnx_intq.placement import MOVING
from onnx_intq.qdq import DEQUANTIZE
from onnx_intq.transform import Context, Pass

CHOOSING = {"GlobalMaxPool", "MaxPool", "ReduceMax", "ReduceMin", "Pad"}
"""Operators that do more with values than to put them somewhere else."""
SMALLEST = 1024
"""Numbers in a table that is worth a node."""


@dataclass(frozen=True, kw_only=True)
class QuantizeTables(Pass):
    """Store tables in integers."""

    needs: ClassVar[frozenset[str]] = frozenset({"quantized"})

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Store them; return how many."""
        names, count = Names(model), 0
        for quantizer in quantizers(model):
            first = _first(model, quantizer)
            if first is None or first.inputs[0].values.size < SMALLEST:
                continue
            why = _store(model, quantizer, first, names)
            if why:
                ctx.skip(first, why)
            else:
                count += 1
        return count


def _first(model: gs.Graph, quantizer: gs.Node) -> gs.Node | None:
    """The first of the nodes that move a float table to a QuantizeLinear; None without such."""
    node, tensor = quantizer, quantizer.inputs[0]
    while not isinstance(tensor, gs.Constant):
        maker = producer(tensor)
        if maker is None or maker.op not in MOVING - CHOOSING or len(maker.outputs) != 1:
            return None
        readers = [reader for reader in tensor.outputs if reader.op != "Shape"]
        if len(readers) != 1 or readers[0] is not node or any(tensor is t for t in model.outputs):
            return None
        node, tensor = maker, maker.inputs[0]
    is_table = node is not quantizer and tensor.values.dtype == np.float32
    return node if is_table and len(tensor.outputs) == 1 else None


def _store(model: gs.Graph, quantizer: gs.Node, first: gs.Node, names: Names) -> str:
    """Store one; return what is in the way, "" if nothing is."""
    table, found = first.inputs[0], parameters(quantizer, quantizer.outputs[0])
    if found is None:
        return "it is quantized with several scales"
    integers = quantize(table.values, found.scale, found.zero_point, found.grid)
    stored = gs.Constant(names.new(f"{table.name}_q"), integers.astype(found.grid.dtype))
    dequantized = gs.Variable(names.new(f"{table.name}_dq"), np.float32, table.shape)
    inputs = [stored, *quantizer.inputs[1:]]
    node = gs.Node(DEQUANTIZE, dequantized.name, {}, inputs, [dequantized])
    first.inputs[0] = dequantized
    model.nodes.insert(model.nodes.index(first), node)
    return ""
