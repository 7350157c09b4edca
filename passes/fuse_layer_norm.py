"""Fuses a LayerNormalization that an exporter wrote as means, differences and a square root.

Before: `d = Sub(x, ReduceMean(x)); v = ReduceMean(Pow(d, 2));
y = Add(Mul(Div(d, Sqrt(Add(v, e))), g), b)`.
After: `y = LayerNormalization(x, g, b)`, opset 17.
Variants: Mul(d, d) for Pow, Mul by Reciprocal for Div, operands of Add and Mul in any order, no b.
Condition: the means run over the last axis; g and b are constants of its length.
Law: outputs do not change but for float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, constant, convert_opset, producer, sole_consumer
from onnx_intq.transform import Context, Pass

OPSET = 17
"""Brought LayerNormalization."""


@dataclass(frozen=True, kw_only=True)
class FuseLayerNorm(Pass):
    """Fuse decomposed layer normalisations."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Fuse; return how many were."""
        if not any(node.op == "Sqrt" for node in model.nodes):
            return 0
        convert_opset(model, OPSET)
        names, found = Names(model), []
        for root in [n for n in model.nodes if n.op == "Sqrt"]:
            matched = _match(model, root)
            if isinstance(matched, str):
                ctx.skip(root, f"is no part of a layer normalisation: {matched}")
            else:
                found.append(matched)
        for norm in found:
            _replace(model, norm, names)
        if found:
            model.cleanup(remove_unused_graph_inputs=False)
        return len(found)


@dataclass(frozen=True, kw_only=True)
class _Norm:
    """A match: what is normalised, and the node that makes the result."""

    x: gs.Tensor
    epsilon: float
    gamma: npt.NDArray[np.float32]
    beta: npt.NDArray[np.float32] | None
    last: gs.Node


def _match(model: gs.Graph, root: gs.Node) -> _Norm | str:
    """The normalisation that divides by the result of `root`, or why there is none."""
    deviation, epsilon = _variance(root)
    centre = None if deviation is None else _made_by(deviation, "Sub")
    if deviation is None or centre is None:
        return "it is not the root of a variance and a constant"
    x, mean = centre.inputs[0], _made_by(centre.inputs[1], "ReduceMean")
    if mean is None or mean.inputs[0] is not x or not _is_last(mean):
        return "what is squared is no deviation from the mean over the last axis"
    scaled = _scaled(model, root, deviation)
    if scaled is None:
        return "its result does not divide the deviation and is multiplied by a constant"
    node, gamma = scaled
    added = _then(model, node, "Add", gamma.size)
    return _Norm(
        x=x,
        epsilon=epsilon,
        gamma=gamma,
        beta=None if added is None else added[1],
        last=node if added is None else added[0],
    )


def _variance(root: gs.Node) -> tuple[gs.Tensor | None, float]:
    """What is squared and averaged under a root, and what is added."""
    added = _made_by(root.inputs[0], "Add")
    if added is None:
        return None, 0.0
    for index in range(2):
        epsilon, mean = constant(added, index), _made_by(added.inputs[1 - index], "ReduceMean")
        if epsilon is not None and epsilon.size == 1 and mean is not None and _is_last(mean):
            return _squared(mean.inputs[0]), float(epsilon.reshape(()))
    return None, 0.0


def _squared(tensor: gs.Tensor) -> gs.Tensor | None:
    product, power = _made_by(tensor, "Mul"), _made_by(tensor, "Pow")
    if product is not None and product.inputs[0] is product.inputs[1]:
        return product.inputs[0]
    exponent = constant(power, 1) if power is not None else None
    if power is None or exponent is None or exponent.size != 1 or exponent.reshape(()) != 2:
        return None
    return power.inputs[0]


def _scaled(
    model: gs.Graph, root: gs.Node, deviation: gs.Tensor
) -> tuple[gs.Node, npt.NDArray[np.float32]] | None:
    """The product of the normalised deviation and a vector, and the vector."""
    divide = sole_consumer(model, root.outputs[0])
    if divide is not None and divide.op == "Reciprocal":
        divide = sole_consumer(model, divide.outputs[0])
        if divide is None or divide.op != "Mul" or not any(t is deviation for t in divide.inputs):
            return None
    elif divide is None or divide.op != "Div" or divide.inputs[0] is not deviation:
        return None
    return _then(model, divide, "Mul")


def _then(
    model: gs.Graph, node: gs.Node, op: str, size: int | None = None
) -> tuple[gs.Node, npt.NDArray[np.float32]] | None:
    """The only reader of `node`, if it is `op` with a constant vector; and the vector."""
    reader = sole_consumer(model, node.outputs[0])
    if reader is None or reader.op != op:
        return None
    for index in range(2):
        values, shape = constant(reader, index), node.outputs[0].shape
        length = shape[-1] if size is None and shape is not None else size
        if values is not None and values.shape == (length,):
            return reader, values
    return None


def _made_by(tensor: gs.Tensor, op: str) -> gs.Node | None:
    maker = producer(tensor)
    return maker if maker is not None and maker.op == op else None


def _is_last(mean: gs.Node) -> bool:
    """Whether a ReduceMean keeps all axes and averages over the last."""
    axes, shape = constant(mean, 1), mean.inputs[0].shape
    given = mean.attrs.get("axes", [] if axes is None else axes.tolist())
    last = [-1] if shape is None else [-1, len(shape) - 1]
    return len(given) == 1 and given[0] in last and mean.attrs.get("keepdims", 1) == 1


def _replace(model: gs.Graph, norm: _Norm, names: Names) -> None:
    (result,) = norm.last.outputs
    vectors = {"gamma": norm.gamma} | ({} if norm.beta is None else {"beta": norm.beta})
    constants = [
        gs.Constant(names.new(f"{result.name}_{name}"), values) for name, values in vectors.items()
    ]
    attrs = {"axis": -1, "epsilon": norm.epsilon}
    norm.last.outputs.clear()
    fused = gs.Node("LayerNormalization", norm.last.name, attrs, [norm.x, *constants], [result])
    model.nodes[model.nodes.index(norm.last)] = fused
