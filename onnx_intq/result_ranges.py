"""The range of a float node's result, from the ranges of its operands: what no data told.

Interval arithmetic in real units. It is exact for monotone functions and too wide for sums of
products, where it assumes the worst signs; it never is too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant
from onnx_intq.transform import Range

Ranges = Sequence[Range | None]

BOUNDED: Mapping[str, Range] = {
    "Sigmoid": (0.0, 1.0),
    "HardSigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Erf": (-1.0, 1.0),
    "Sin": (-1.0, 1.0),
    "Cos": (-1.0, 1.0),
    "Softsign": (-1.0, 1.0),
}
"""Operators whose results lie in a fixed range."""
INCREASING: Mapping[str, Callable[[float], float]] = {
    "Relu": lambda x: max(x, 0.0),
    "Exp": lambda x: float(np.exp(min(x, 80.0))),
    "Softplus": lambda x: float(np.logaddexp(0.0, x)),
    "Floor": lambda x: float(np.floor(x)),
    "Ceil": lambda x: float(np.ceil(x)),
    "Round": lambda x: float(np.rint(x)),
    "Sqrt": lambda x: float(np.sqrt(max(x, 0.0))),
}
"""Operators that keep order: the ends of the result are those of the operand."""
SAME = {"AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceMax", "ReduceMin"}
"""Operators whose results lie between the ends of their operand."""
LEAST = {"Gelu": -0.17, "Swish": -0.2785, "Mish": -0.309, "HardSwish": -0.375}
"""Operators close to max(x, 0), with their lowest values."""


def result_range(node: gs.Node, operands: Ranges) -> Range | None:
    """The range of a node's first result.

    Args:
        node: A float node.
        operands: One per input, None where unknown or absent.

    Returns:
        (low, high) in real units; None where it cannot be told.
    """
    if node.op in BOUNDED:
        return BOUNDED[node.op]
    first = operands[0] if operands else None
    if node.op in {"Where", "Concat", "Max", "Min", "Sum"}:
        return _of_several(node.op, operands)
    if first is None:
        return None
    if node.op in INCREASING:
        low, high = (INCREASING[node.op](end) for end in first)
        return low, high
    if node.op in SAME:
        return first
    if node.op in LEAST:
        return max(LEAST[node.op], min(first[0], 0.0)), max(first[1], 0.0)
    rule = RULES.get(node.op)
    return rule(node, operands) if rule is not None else None


def _of_several(op: str, operands: Ranges) -> Range | None:
    known = [r for r in (operands[1:] if op == "Where" else operands) if r is not None]
    if len(known) < len(operands) - (op == "Where") or not known:
        return None
    lows, highs = zip(*known, strict=True)
    return (sum(lows), sum(highs)) if op == "Sum" else (min(lows), max(highs))


def _clip(node: gs.Node, operands: Ranges) -> Range | None:
    low, high = operands[0] or (0.0, 0.0)
    least, most = constant(node, 1), constant(node, 2)
    floor = -np.inf if least is None else float(least)
    ceiling = np.inf if most is None else float(most)
    return float(np.clip(low, floor, ceiling)), float(np.clip(high, floor, ceiling))


def _binary(node: gs.Node, operands: Ranges) -> Range | None:
    a, b = operands[0], operands[1]
    if a is None or b is None:
        return None
    if node.op == "Div":
        if b[0] <= 0.0 <= b[1]:
            return None
        b = (1 / b[1], 1 / b[0])
    if node.op == "Sub":
        b = (-b[1], -b[0])
    if node.op in {"Add", "Sub"}:
        return a[0] + b[0], a[1] + b[1]
    products = [x * y for x in a for y in b]
    return min(products), max(products)


def _log_softmax(node: gs.Node, operands: Ranges) -> Range | None:
    low, high = operands[0] or (0.0, 0.0)
    shape, axis = node.inputs[0].shape, node.attrs.get("axis", -1)
    size = shape[axis] if shape is not None else None
    if not isinstance(size, int):
        return None
    return low - high - float(np.log(size)), 0.0


def _layer_norm(node: gs.Node, _: Ranges) -> Range | None:
    """No element of n normalised ones exceeds the root of n - 1."""
    gamma, beta = constant(node, 1), constant(node, 2)
    if gamma is None:
        return None
    reach = float(np.sqrt(gamma.size) * np.abs(gamma).max())
    reach += 0.0 if beta is None else float(np.abs(beta).max())
    return -reach, reach


def _product(node: gs.Node, operands: Ranges) -> Range | None:
    """Of Conv, Gemm and MatMul with a constant factor: the worst signs at every tap."""
    x, w = operands[0], constant(node, 1)
    if x is None or w is None:
        return None
    rows = w.reshape(w.shape[0], -1) if node.op == "Conv" else np.moveaxis(w, -2, -1)
    if node.op == "Gemm" and node.attrs.get("transB", 0):
        rows = w
    positive, negative = np.maximum(rows, 0).sum(axis=-1), np.minimum(rows, 0).sum(axis=-1)
    low = float((positive * min(x[0], 0) + negative * max(x[1], 0)).min())
    high = float((positive * max(x[1], 0) + negative * min(x[0], 0)).max())
    bias = constant(node, 2) if node.op != "MatMul" else None
    shift = (0.0, 0.0) if bias is None else (float(bias.min()), float(bias.max()))
    return low + min(shift[0], 0.0), high + max(shift[1], 0.0)


def _power(node: gs.Node, operands: Ranges) -> Range | None:
    exponent = constant(node, 1)
    if exponent is None or exponent.size != 1 or float(exponent.reshape(())) != 2.0:
        return None
    low, high = operands[0] or (0.0, 0.0)
    return (0.0 if low <= 0.0 <= high else min(low**2, high**2)), max(low**2, high**2)


RULES: Mapping[str, Callable[[gs.Node, Ranges], Range | None]] = {
    "Clip": _clip,
    "Add": _binary,
    "Sub": _binary,
    "Mul": _binary,
    "Div": _binary,
    "Abs": lambda _, o: None if o[0] is None else (0.0, max(map(abs, o[0]))),
    "Neg": lambda _, o: None if o[0] is None else (-o[0][1], -o[0][0]),
    "LogSoftmax": _log_softmax,
    "LayerNormalization": _layer_norm,
    "Conv": _product,
    "Gemm": _product,
    "MatMul": _product,
    "Pow": _power,
}
