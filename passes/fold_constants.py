"""Computes every node whose inputs are all constant.

Before: `y = Add(a, b)` with initializers a and b.   After: initializer y.
Condition: the operator is deterministic, has no body, and is no QuantizeLinear/DequantizeLinear
(quantized weights must stay quantized); the result is at most 1 MiB larger than its inputs.
Law: outputs do not change (the arithmetic is onnx's reference evaluator's).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from onnx_intq.graph import first_line, remove, subgraphs
from onnx_intq.transform import Context, Pass

LARGEST_GROWTH = 1 << 20
"""Bytes by which a folded result may exceed its inputs: Expand and ConstantOfShape stay small."""
_KEPT = {"QuantizeLinear", "DequantizeLinear", "RandomNormal", "RandomUniform", "Bernoulli"}
_KEPT |= {"RandomNormalLike", "RandomUniformLike", "Multinomial", "Dropout"}


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Replace nodes with constant inputs by their values."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Fold in graph order, bodies included; return the number of nodes folded."""
        count = 0
        for sub in subgraphs(model):
            folded = [node for node in sub.nodes if _fold(node, model.opset, ctx)]
            remove(sub, folded)
            count += len(folded)
        return count


def _fold(node: gs.Node, opset: int, ctx: Context) -> bool:
    if not _is_constant(node):
        return False
    alone = _model(node, opset)
    try:
        # Shapes come first: a value that is too large must not even be computed.
        if _result_bytes(alone) > _given_bytes(alone) + LARGEST_GROWTH:
            ctx.skip(node, "constant, but its value would enlarge the file")
            return False
        values = ReferenceEvaluator(alone).run(None, {})
    except Exception as error:  # noqa: BLE001  the evaluator raises whatever NumPy does
        ctx.skip(node, f"constant, but the reference evaluator fails: {first_line(error)}")
        return False
    for tensor, value in zip(_results(node), values, strict=True):
        tensor.inputs.clear()
        tensor.to_constant(np.asarray(value))
    return True


def _is_constant(node: gs.Node) -> bool:
    return (
        not (node.op in _KEPT or node.domain)
        and any(isinstance(t, gs.Constant) for t in node.inputs)
        and all(isinstance(t, gs.Constant) or t.is_empty() for t in node.inputs)
        and not any(isinstance(value, gs.Graph) for value in node.attrs.values())
    )


def _results(node: gs.Node) -> list[gs.Tensor]:
    return [t for t in node.outputs if not t.is_empty()]


def _model(node: gs.Node, opset: int) -> onnx.ModelProto:
    """A model of this node alone."""
    given = {t.name: t.values for t in node.inputs if isinstance(t, gs.Constant)}
    graph = onnx.helper.make_graph(
        [gs.exporters.onnx_exporter.OnnxExporter.export_node(node)],
        "constant",
        inputs=[],
        outputs=[onnx.ValueInfoProto(name=t.name) for t in _results(node)],
        initializer=[onnx.numpy_helper.from_array(v, name) for name, v in given.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


def _given_bytes(model: onnx.ModelProto) -> int:
    return sum(len(t.raw_data) for t in model.graph.initializer)


def _result_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the results, as far as their shapes can be inferred."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    types = [value.type.tensor_type for value in inferred.graph.output]
    return sum(
        math.prod(d.dim_value for d in found.shape.dim)
        * onnx.helper.tensor_dtype_to_np_dtype(found.elem_type).itemsize
        for found in types
        if found.elem_type
    )
