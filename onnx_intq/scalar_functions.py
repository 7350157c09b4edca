"""Elementwise operators as functions of one real variable, in float64: for tables and comparisons.

onnx's reference implementation computes them, so that there is one definition of each operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from onnx_intq.graph import producer
from onnx_intq.lowering import constant_values

Float64 = npt.NDArray[np.float64]
Function = Callable[[Float64], Float64]

SMOOTH = "Sigmoid Tanh Exp Erf Gelu Swish Mish Softplus Softsign Elu Selu Celu Log Sqrt Reciprocal"
CIRCULAR = "Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh"
STRAIGHT = "HardSigmoid HardSwish ThresholdedRelu Shrink Floor Ceil Round Sign"
UNARY = frozenset(f"{SMOOTH} {CIRCULAR} {STRAIGHT}".split())
"""Operators with one input; those made of two straight lines, such as Relu, are not among them."""
BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Pow"})
"""Operators that are functions of one variable where all but one input are scalar constants."""
ELEMENTWISE = UNARY | BINARY | {"Neg", "Abs", "Relu", "Clip"}
LONGEST = 12
"""Nodes between a variable and a composed function of it: the tanh form of GELU has 9."""
DOMAINS = {"Sqrt": 0.0, "Log": 0.0}
"""Operators without a value below that; there they take the value at the end of their domain."""


def function(node: gs.Node) -> Function:
    """What an operator of `UNARY`, or one of `BINARY` with a constant scalar, computes.

    Values below the domain of a root or logarithm count as its end: a grid may reach there by its
    rounding although no tensor does.
    """
    index, lowest = variable(node), DOMAINS.get(node.op, -np.inf)
    fixed = [constant_values(t) for t in node.inputs]

    def compute(x: Float64) -> Float64:
        reals = np.maximum(x, lowest)
        return evaluate(node, [reals if i == index else _real(v) for i, v in enumerate(fixed)])

    return compute


def variable(node: gs.Node) -> int | None:
    """Which input is the only computed one, all others being scalar constants; None if none is."""
    constants = [constant_values(t) for t in node.inputs]
    computed = [i for i, values in enumerate(constants) if values is None]
    scalars = all(values is None or values.size == 1 for values in constants)
    return computed[0] if len(computed) == 1 and scalars else None


def evaluate(node: gs.Node, inputs: Sequence[Float64 | None]) -> Float64:
    """An elementwise operator on float64 arrays; None stands for an optional input left out."""
    feeds = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
    if node.op in OWN:
        return OWN[node.op](node, feeds["x0"])
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    proto = onnx.helper.make_node(node.op, names, ["y"], **node.attrs)
    with np.errstate(all="ignore"):
        (result,) = ReferenceEvaluator(proto).run(None, feeds)
    return np.asarray(result, np.float64)


def between(end: gs.Tensor, start: gs.Tensor) -> list[gs.Node] | None:
    """The elementwise operators that make `end` of `start` and scalar constants alone, or None."""
    found: dict[int, gs.Node] = {}
    return list(found.values()) if _closed(end, start, found) else None


def composed(end: gs.Tensor, start: gs.Tensor, x: Float64) -> Float64:
    """The values of `end` where `start` is `x`; there must be nodes `between`."""
    return np.asarray(_computed(end, {id(start): x}))


def above(end: gs.Tensor) -> list[gs.Tensor]:
    """The tensors that `end` may be an elementwise function of, the nearest first."""
    found = [end]
    for tensor in found:
        maker = producer(tensor)
        if maker is not None and maker.op in ELEMENTWISE and len(found) < 2 * LONGEST:
            inputs = [t for t in maker.inputs if constant_values(t) is None and not t.is_empty()]
            found += [t for t in inputs if not any(t is other for other in found)]
    return found[1:]


def _closed(tensor: gs.Tensor, start: gs.Tensor, nodes: dict[int, gs.Node]) -> bool:
    """Whether nothing but `start` and scalar constants is read; collects the nodes."""
    values, maker = constant_values(tensor), producer(tensor)
    if tensor is start or values is not None or maker is None:
        return tensor is start or tensor.is_empty() or (values is not None and values.size == 1)
    if id(maker) in nodes:
        return True
    nodes[id(maker)] = maker
    if maker.op not in ELEMENTWISE or len(nodes) > LONGEST:
        return False
    return all(_closed(t, start, nodes) for t in maker.inputs)


def _computed(tensor: gs.Tensor, known: dict[int, Float64]) -> Float64 | None:
    values, maker = constant_values(tensor), producer(tensor)
    if id(tensor) in known or values is not None or maker is None:
        return known.get(id(tensor), _real(values))
    known[id(tensor)] = evaluate(maker, [_computed(t, known) for t in maker.inputs])
    return known[id(tensor)]


def _real(values: npt.NDArray[Any] | None) -> Float64 | None:
    return None if values is None else values.astype(np.float64).reshape(())


def _gelu(node: gs.Node, x: Float64) -> Float64:
    if node.attrs.get("approximate", "none") == "tanh":
        cubic = x + 0.044715 * x**3
        return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * cubic)))
    # erfc keeps the left tail, where 1 + erf is 0.
    return np.asarray(0.5 * x * _each(math.erfc, -x / math.sqrt(2)))


def _each(scalar: Callable[[float], float], x: Float64) -> Float64:
    return np.reshape([scalar(value) for value in x.flat], x.shape)


OWN: Mapping[str, Callable[[gs.Node, Float64], Float64]] = {
    "Erf": lambda _, x: _each(math.erf, x),
    "Gelu": _gelu,
}
"""What the reference implementation computes in float32, or lacks."""
