"""Folds multiplications by a constant scalar into the weights of the operator before.

Before: `y = Mul(Add(MatMul(x, w), b), c)`.   After: `y = Add(MatMul(x, w * c), b * c)`.
So for Div, behind Conv, ConvTranspose and Gemm, and where the values are moved between (Reshape,
Transpose, ...): a Conformer's half feed-forwards and scaled queries lose a node each, and a
quantized model a rounding.
Condition: weights and bias are constant and read by this operator alone, nothing else reads what is
between, c is finite and not 0.
Law: outputs do not change but for float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, constant, producer, remove
from onnx_intq.placement import SAME_GRID, WEIGHTED, is_bias
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class FoldScale(Pass):
    """Fold scalar factors into the weights before them."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Fold; return how many factors were."""
        names, folded = Names(model), []
        for node in [n for n in model.nodes if n.op in {"Mul", "Div"}]:
            found = _factor(node)
            if found is None:
                continue
            chain = _chain(model, node.inputs[found[0]])
            why = _obstacle(chain)
            if why:
                ctx.skip(node, why)
                continue
            _scale(chain, found[1], names)
            _rename(chain, node, names)
            folded.append(node)
        remove(model, folded)
        return len(folded)


def _factor(node: gs.Node) -> tuple[int, float] | None:
    """Which input a node multiplies by a scalar constant, and by how much; None if it does not."""
    for index in (0,) if node.op == "Div" else (0, 1):
        values = constant(node, 1 - index)
        if values is None or values.size != 1 or values.dtype != np.float32:
            continue
        if isinstance(node.inputs[index], gs.Constant) or values.ndim > len(_shape(node, index)):
            continue
        scalar = float(values.reshape(()))
        if not np.isfinite(scalar) or scalar == 0:
            return None
        return index, 1 / scalar if node.op == "Div" else scalar
    return None


def _shape(node: gs.Node, index: int) -> tuple[object, ...]:
    return tuple(node.inputs[index].shape or ())


def _chain(model: gs.Graph, tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes back from `tensor` to the first that neither moves values nor adds a bias.

    It ends early where something else reads what is between.
    """
    chain: list[gs.Node] = []
    outputs = {id(t) for t in model.outputs}
    while (maker := producer(tensor)) is not None and _is_read_once(tensor, outputs):
        chain.append(maker)
        if maker.op in SAME_GRID - {"MaxPool"}:
            tensor = maker.inputs[0]
        elif is_bias(maker):
            tensor = maker.inputs[_computed(maker)]
        else:
            break
    return chain


def _is_read_once(tensor: gs.Tensor, outputs: set[int]) -> bool:
    """Whether one node reads the values; those that ask for a shape do not count."""
    readers = [node for node in tensor.outputs if node.op != "Shape"]
    return len(readers) == 1 and id(tensor) not in outputs


def _computed(node: gs.Node) -> int:
    return next(i for i, t in enumerate(node.inputs) if not isinstance(t, gs.Constant))


def _obstacle(chain: list[gs.Node]) -> str:
    """Why a factor cannot go into the last node of a chain, "" if it can."""
    if not chain or chain[-1].op not in WEIGHTED:
        return "what it multiplies is made by no operator with weights, or read elsewhere too"
    linear = chain[-1]
    if linear.op != "MatMul" and not all(
        isinstance(t, gs.Constant) or t.is_empty() for t in linear.inputs[1:]
    ):
        return f"the weights of {linear.name} are computed"
    vectors = _constants(chain)
    if not vectors or not any(node is linear for node, _ in vectors):
        return f"the weights of {linear.name} are computed"
    if any(len(node.inputs[index].outputs) > 1 for node, index in vectors):
        return f"the weights of {linear.name} are read elsewhere too"
    return ""


def _constants(chain: list[gs.Node]) -> list[tuple[gs.Node, int]]:
    """What to multiply: the weight, and what is added behind it."""
    linear = chain[-1]
    found = [(node, 1 - _computed(node)) for node in chain if node.op == "Add"]
    places = range(1, len(linear.inputs)) if linear.op != "MatMul" else range(2)
    constants = [i for i in places if isinstance(linear.inputs[i], gs.Constant)]
    return [*found, *((linear, i) for i in constants)]


def _scale(chain: list[gs.Node], factor: float, names: Names) -> None:
    for node, index in _constants(chain):
        old = node.inputs[index]
        values = np.asarray(old.values.astype(np.float64) * factor, old.values.dtype)
        node.inputs[index] = gs.Constant(names.new(f"{old.name}_scaled"), values)


def _rename(chain: list[gs.Node], node: gs.Node, names: Names) -> None:
    """The first of the chain makes the node's result; what is between has other values now."""
    for inner in chain:
        inner.outputs[0].name = names.new(f"{inner.outputs[0].name}_scaled")
    (result,), (scaled,) = node.outputs, chain[0].outputs
    node.outputs.clear()
    chain[0].outputs[0] = result
    for reader in scaled.outputs:
        if reader.op == "Shape":
            reader.inputs[0] = result
