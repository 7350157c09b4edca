"""Computes every node whose inputs are all constant.

Before: `y = Add(a, b)` with initializers a and b.   After: initializer y.
Condition: the operator is deterministic, has no body, and is no QuantizeLinear/DequantizeLinear
(quantized weights must stay quantized); the result is at most 1 MiB larger than its inputs.
Law: outputs do not change (the arithmetic is onnx's reference evaluator's).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from onnx_intq.graph import first_line, subgraphs
from onnx_intq.transform import Context, Pass

LARGEST_GROWTH = 1 << 20
"""Bytes by which a folded result may exceed its inputs: Expand and ConstantOfShape stay small."""
_KEPT = {"QuantizeLinear", "DequantizeLinear", "RandomNormal", "RandomUniform", "Bernoulli"}
_KEPT |= {"RandomNormalLike", "RandomUniformLike", "Multinomial", "ConstantOfShape"}


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Replace nodes with constant inputs by their values."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Fold in topological order, bodies included; return the number of nodes folded."""
        return sum(_fold(node, model, ctx) for sub in subgraphs(model) for node in list(sub.nodes))


def _fold(node: gs.Node, model: gs.Graph, ctx: Context) -> bool:
    if node.op in _KEPT or node.domain or not node.inputs:
        return False
    if not all(isinstance(t, gs.Constant) or t.is_empty() for t in node.inputs):
        return False
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return False
    try:
        values = _evaluate(node, model.opset)
    except Exception as error:  # noqa: BLE001  the evaluator raises whatever NumPy does
        ctx.skip(node, f"constant, but the reference evaluator fails: {first_line(error)}")
        return False
    given = sum(t.values.nbytes for t in node.inputs if isinstance(t, gs.Constant))
    if sum(v.nbytes for v in values) > given + LARGEST_GROWTH:
        ctx.skip(node, "constant, but its value would enlarge the file")
        return False
    outputs = list(node.outputs)
    node.outputs.clear()
    node.inputs.clear()
    for tensor, value in zip(outputs, values, strict=True):
        tensor.to_constant(value)
    return True


def _evaluate(node: gs.Node, opset: int) -> list[np.ndarray[Any, Any]]:
    proto = gs.exporters.onnx_exporter.OnnxExporter.export_node(node)
    feeds = {t.name: t.values for t in node.inputs if isinstance(t, gs.Constant)}
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [proto],
            "constant",
            [
                onnx.helper.make_tensor_value_info(
                    name, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape
                )
                for name, v in feeds.items()
            ],
            [onnx.ValueInfoProto(name=t.name) for t in node.outputs],
        ),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
    )
    return [np.asarray(v) for v in ReferenceEvaluator(model).run(None, feeds)]
