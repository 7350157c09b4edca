"""The range of a float node's result, from the ranges of its operands: what no data told.

Interval arithmetic in real units. It is exact for monotone functions and too wide for sums of
products, where it assumes the worst signs; it never is too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.composites import swish
from onnx_intq.graph import constant, producer
from onnx_intq.lowering import constant_values, operand
from onnx_intq.placement import MOVING
from onnx_intq.qdq import QDQ, has_input
from onnx_intq.scalar_functions import function
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
SAME = (MOVING - {"Pad"}) | {"GlobalAveragePool", "ReduceMean"}
"""Operators whose results lie between the ends of their operand."""
LEAST = {"Gelu": -0.1701, "Swish": -0.2785, "Mish": -0.309, "HardSwish": -0.375}
"""Operators close to max(x, 0), with their lowest values."""
MONOTONE = {"Elu", "Selu", "Celu", "Log", "Reciprocal", "Atan", "Asinh", "Sinh"}
"""Operators whose results lie between those of the operand's ends, where these are finite."""
PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
NEGLIGIBLE = 24.0
"""So far below the others, a logit has no part in a softmax: e^-24 < 2^-34."""


def range_of(tensor: gs.Tensor, nodes: int = 2) -> Range | None:
    """The range of an operand, also where a bias Add or an activation runs in its operator.

    Args:
        tensor: Dequantized, constant, or made of such by a few nodes.
        nodes: How many may stand between.
    """
    maker, known = producer(tensor), operand(tensor)
    if known is not None and not isinstance(known.tensor, gs.Constant):
        return known.low, known.high
    values = constant_values(tensor)
    if values is not None:
        floats = values.dtype == np.float32 and values.size > 0
        return (float(values.min()), float(values.max())) if floats else None
    if maker is None or not nodes or maker.op in QDQ:
        return None
    return result_range(maker, [range_of(t, nodes - 1) for t in maker.inputs])


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
    if node.op == "Cast" and node.inputs[0].dtype == np.bool_:
        return 0.0, 1.0
    if node.op in PRODUCTS:
        return _product(node, operands)
    if first is None:
        return None
    if node.op in INCREASING:
        low, high = (INCREASING[node.op](end) for end in first)
        return low, high
    if node.op in SAME:
        return first
    if node.op in LEAST:
        return _rectified(node.op, first)
    rule = RULES.get(node.op)
    return rule(node, operands) if rule is not None else None


def _rectified(op: str, x: Range) -> Range:
    return max(LEAST[op], min(x[0], 0.0)), max(x[1], 0.0)


def _monotone(node: gs.Node, operands: Ranges) -> Range | None:
    low, high = operands[0] or (0.0, 0.0)
    if node.op == "Reciprocal" and low <= 0.0 <= high:
        return None
    ends = function(node)(np.array([low, high]))
    return (float(ends.min()), float(ends.max())) if np.isfinite(ends).all() else None


def _of_several(op: str, operands: Ranges) -> Range | None:
    known = [r for r in (operands[1:] if op == "Where" else operands) if r is not None]
    if len(known) < len(operands) - (op == "Where") or not known:
        return None
    lows, highs = zip(*known, strict=True)
    return (sum(lows), sum(highs)) if op == "Sum" else (min(lows), max(highs))


def _clip(node: gs.Node, operands: Ranges) -> Range | None:
    low, high = operands[0] or (0.0, 0.0)
    least, most = constant(node, 1), constant(node, 2)
    if _is_computed(node, 1) or _is_computed(node, 2):
        return None
    floor = -np.inf if least is None else float(least)
    ceiling = np.inf if most is None else float(most)
    return float(np.clip(low, floor, ceiling)), float(np.clip(high, floor, ceiling))


def _binary(node: gs.Node, operands: Ranges) -> Range | None:
    a, b = operands[0], operands[1]
    if a is None or b is None:
        return None
    if (gate := swish(node)) is not None:
        return _rectified("Swish", b if producer(node.inputs[0]) is gate else a)
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
    sizes = (node.inputs[0].shape or [None])[node.attrs.get("axis", -1) :]
    if gamma is None or _is_computed(node, 2) or not all(isinstance(n, int) for n in sizes):
        return None
    reach = float(np.sqrt(np.prod(sizes)) * np.abs(gamma).max())
    reach += 0.0 if beta is None else float(np.abs(beta).max())
    return -reach, reach


def masked_logits(choices: Ranges) -> Range | None:
    """The range a Where needs that gives logits to a softmax, and a huge negative number elsewhere.

    Args:
        choices: Of the logits and of the constant, in any order.

    Returns:
        From `NEGLIGIBLE` below the logits; None where the constant is not lower, or one is unknown.
    """
    known = [r for r in choices if r is not None]
    if len(known) != 2:
        return None
    lower, logits = sorted(known, key=lambda r: r[1])
    lowest = logits[0] - NEGLIGIBLE
    return (lowest, logits[1]) if lower[1] < lowest else None


def _product(node: gs.Node, operands: Ranges) -> Range | None:
    """Of Conv, ConvTranspose, Gemm and MatMul with a constant: the worst signs at every tap."""
    left, right = (constant_values(t) for t in node.inputs[:2])
    w, x = (left, operands[1]) if right is None else (right, operands[0])
    if x is None or w is None or _is_computed(node, 2):
        return None
    rows = _summed_last(node, w, left=right is None)
    positive, negative = np.maximum(rows, 0).sum(axis=-1), np.minimum(rows, 0).sum(axis=-1)
    low = float((positive * min(x[0], 0) + negative * max(x[1], 0)).min())
    high = float((positive * max(x[1], 0) + negative * min(x[0], 0)).max())
    alpha, bias = node.attrs.get("alpha", 1.0), _gemm_bias(node)
    ends = sorted((alpha * low, alpha * high))
    return ends[0] + min(bias[0], 0.0), ends[1] + max(bias[1], 0.0)


def _summed_last(node: gs.Node, w: npt.NDArray[Any], *, left: bool) -> npt.NDArray[Any]:
    """A constant factor with the axes that are summed as its last."""
    if node.op == "Conv":
        return w.reshape(w.shape[0], -1)
    if node.op == "ConvTranspose":  # [inputs, outputs per group, kernel ...]
        groups = w.reshape(node.attrs.get("group", 1), -1, w.shape[1], int(np.prod(w.shape[2:])))
        return np.moveaxis(groups, 1, 2).reshape(len(groups) * w.shape[1], -1)
    if node.attrs.get("transA" if left else "transB", 0):
        w = w.T
    return w if left or w.ndim == 1 else np.moveaxis(w, -2, -1)


def _gemm_bias(node: gs.Node) -> Range:
    bias = constant_values(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is None:
        return 0.0, 0.0
    values = bias.astype(np.float64) * node.attrs.get("beta", 1.0)
    return float(values.min()), float(values.max())


def _padded(node: gs.Node, operands: Ranges) -> Range | None:
    low, high = operands[0] or (0.0, 0.0)
    fill = operands[2] if has_input(node, 2) else (0.0, 0.0)
    return None if fill is None else (min(low, fill[0]), max(high, fill[1]))


def _is_computed(node: gs.Node, index: int) -> bool:
    """Whether an optional input is given whose values are unknown."""
    return has_input(node, index) and constant_values(node.inputs[index]) is None


def _total(node: gs.Node, operands: Ranges) -> Range | None:
    """Of ReduceSum over axes of fixed sizes."""
    shape, axes = node.inputs[0].shape, constant(node, 1)
    if shape is None or (axes is None and len(node.inputs) > 1):
        return None
    sizes = [shape[a] for a in (range(len(shape)) if axes is None else axes.tolist())]
    if not all(isinstance(size, int) for size in sizes):
        return None
    low, high = operands[0] or (0.0, 0.0)
    return float(np.prod(sizes)) * min(low, 0.0), float(np.prod(sizes)) * max(high, 0.0)


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
    "Pow": _power,
    "AveragePool": lambda _, o: None if o[0] is None else (min(o[0][0], 0), max(o[0][1], 0)),
    **dict.fromkeys(MONOTONE, _monotone),
    "Pad": _padded,
    "ReduceSum": _total,
}
