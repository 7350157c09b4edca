"""Shape inference through bounds and sizes that a model computes from the shapes of its tensors.

onnx's own inference stops at a Slice or Reshape whose bounds are computed. Here they are computed
as soon as the shapes that they depend on are known, and inference goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator

Values = dict[str, npt.NDArray[Any]]
LARGEST = 4096
"""Most elements of a tensor that counts as shape arithmetic."""
EVALUATED = frozenset(
    (
        *("Abs", "Add", "Ceil", "Div", "Floor", "Max", "Min", "Mod", "Mul", "Neg", "Sub"),
        *("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Where"),
        *("Cast", "Identity", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum"),
        *("ConstantOfShape", "Range", "Expand", "Tile", "Concat", "Gather", "Slice", "Split"),
        *("Reshape", "Squeeze", "Transpose", "Unsqueeze"),
    )
)
"""Operators that shapes are computed with."""


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Infer all shapes that follow from those of the inputs.

    Args:
        model: Changed: nodes that only compute with shapes become initializers.

    Raises:
        onnx.shape_inference.InferenceError: The inputs' shapes contradict the model.
    """
    known = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_location != tensor.EXTERNAL and math.prod(tensor.dims) <= LARGEST
    }
    while True:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        found = _compute(inferred, known)
        if not found:
            return inferred
        known |= found
        _replace(model, found)


def static_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors as far as it says them in numbers."""
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    types = {value.name: value.type.tensor_type for value in values}
    return {
        name: tuple(d.dim_value for d in found.shape.dim)
        for name, found in types.items()
        if found.HasField("shape") and all(d.HasField("dim_value") for d in found.shape.dim)
    } | {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def _compute(model: onnx.ModelProto, known: Values) -> Values:
    """The results of all nodes that can be computed now, one after the other."""
    shapes, found = static_shapes(model), Values()
    for node in model.graph.node:
        results = [name for name in node.output if name]
        if node.op_type == "Shape" and node.input[0] in shapes:
            start, end = (_attribute(node, name) for name in ("start", "end"))
            found[results[0]] = np.array(shapes[node.input[0]], np.int64)[start:end]
        elif node.op_type in EVALUATED and all(
            math.prod(shapes.get(name, (LARGEST + 1,))) <= LARGEST for name in results
        ):
            given = {name: (known | found).get(name) for name in node.input if name}
            if given and all(value is not None for value in given.values()):
                found |= _evaluate(node, model, given)
    return found


def _attribute(node: onnx.NodeProto, name: str) -> int | None:
    return next((a.i for a in node.attribute if a.name == name), None)


def _evaluate(node: onnx.NodeProto, model: onnx.ModelProto, given: Mapping[str, Any]) -> Values:
    """The node's results, or none where the reference evaluator cannot compute them."""
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in given.items()]
    graph = onnx.helper.make_graph([node], "node", [], outputs, tensors)
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    try:
        results = ReferenceEvaluator(alone).run(None, {})
    except Exception:  # noqa: BLE001  the evaluator raises whatever NumPy does
        return {}
    return {value.name: np.asarray(r) for value, r in zip(outputs, results, strict=True)}


def _replace(model: onnx.ModelProto, found: Values) -> None:
    """Put initializers in the place of the nodes that make them."""
    kept = [node for node in model.graph.node if not found.keys() & set(node.output)]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in found.items()
    )
