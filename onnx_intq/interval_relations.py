"""What holds of a result because its node's operands depend on each other.

Intervals forget that: x - x / 8 * 8 would be as wide as x twice. A relation recognises operands by
the nodes that made them. It answers with a box that holds the results, to be cut with that of the
operator's rule, or None where the operands do not stand in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant, producer
from onnx_intq.interval_arithmetic import (
    Array,
    Box,
    box,
    common,
    corners,
    growing,
    negative,
    truncated,
    union,
)
from onnx_intq.interval_rules import INT32, Place

Relation = Callable[[Place], Box | None]

COMPARISONS = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")


def related(place: Place, result: Box) -> Box:
    """The results of a node, cut with what relations of its operands say.

    Args:
        place: The node.
        result: By the operator's rule.
    """
    found = (relation(place) for relation in RELATIONS.get(place.node.op, ()))
    return common(result, *(each for each in found if each is not None))


def _below_maximum(place: Place) -> Box | None:
    """ReduceMax(x) - x is not negative, where onnxruntime takes the right maxima."""
    maximum, x = place.node.inputs
    chain = _chain(maximum, "ReduceMax")
    if chain is None or chain[0].inputs[0] is not x or not chain[0].attrs.get("keepdims", 1):
        return None
    low, high = place.ends(1)
    return box(0, high - low) if INT32[0] <= low and high <= INT32[1] else None


def _remainder(place: Place) -> Box | None:
    """The remainder x - x / c * c is smaller than c and has the sign of x: Div truncates."""
    a, b = place.node.inputs
    if left := _divided_out(place, a, b):
        return left
    left = _divided_out(place, b, a)
    return negative(left) if left else None


def _divided_out(place: Place, x: gs.Tensor, product: gs.Tensor) -> Box | None:
    """Of x less the product, if that is x / c * c."""
    multiplied = _chain(product, "Mul")
    for quotient, factor in permutations(multiplied[0].inputs) if multiplied else ():
        divided = _chain(quotient, "Div")
        if divided and divided[0].inputs[0] is x and divided[0].inputs[1] is factor:
            low, high = place.box(x).ends
            most = max(*map(abs, place.box(factor).ends), 1) - 1
            return box(-most if low < 0 else 0, most if high > 0 else 0)
    return None


def _extreme(place: Place) -> Box | None:
    """Where(x < y, y, x) is their maximum, Where(x < y, x, y) their minimum."""
    condition, chosen, other = place.node.inputs
    compared = producer(condition)
    if compared is None or compared.op not in COMPARISONS:
        return None
    smaller, larger = compared.inputs if "Less" in compared.op else reversed(compared.inputs)
    if chosen is larger and other is smaller:
        return growing(np.maximum, place[1], place[2])
    if chosen is smaller and other is larger:
        return growing(np.minimum, place[1], place[2])
    return None


def _step(place: Place) -> Box | None:
    """In x / table[n], n being how many thresholds x reaches, both are known at a time."""
    chain = _chain(place.node.inputs[1], "Gather")
    table = constant(chain[0], 0) if chain else None
    if chain is None or table is None or table.ndim != 1:
        return None
    x, thresholds = _counted(chain[0].inputs[1]) or (None, [])
    if x is None or len(table) <= len(thresholds) or not _same(place, place.node.inputs[0], x):
        return None
    low, high = place.ends(0)
    steps = zip([low, *thresholds], [*thresholds, high + 1], map(int, table), strict=False)
    parts = [(max(low, start), min(high, stop - 1), entry) for start, stop, entry in steps]
    return union(*(corners(truncated, box(a, b), box(c, c)) for a, b, c in parts if a <= b))


def _counted(number: gs.Tensor) -> tuple[gs.Tensor, list[int]] | None:
    """Of ReduceSum(Where(x >= thresholds, 1, 0)), tensor x and the thresholds in order."""
    chain = _chain(number, "ReduceSum", "Where", "GreaterOrEqual")
    if chain is None or not chain[0].attrs.get("keepdims", 1):
        return None
    reads = zip((chain[0], chain[1], chain[1], chain[2]), (1, 1, 2, 1), strict=True)
    axes, one, zero, thresholds = (constant(node, index) for node, index in reads)
    x = chain[2].inputs[0]
    if axes is None or thresholds is None or thresholds.dtype.kind not in "iu":
        return None
    if not _along(thresholds, axes, x.shape) or one is None or zero is None:
        return None
    if one.tolist() != 1 or zero.tolist() != 0:
        return None
    return x, sorted(map(int, thresholds.flat))


def _along(values: Array, axes: Array, shape: Sequence[int | str] | None) -> bool:
    """Whether values lie along the only one of the axes, where the shape has length 1."""
    if shape is None or axes.size != 1 or values.ndim > len(shape):
        return False
    axis = int(axes.item())
    padded = *(1,) * (len(shape) - values.ndim), *values.shape
    return shape[axis] == 1 and padded[axis] == values.size


def _same(place: Place, tensor: gs.Tensor, x: gs.Tensor) -> bool:
    """Whether the tensor is x, or one is a Cast of the other that changes no value."""
    for cast, source in ((tensor, x), (x, tensor)):
        chain = _chain(cast, "Cast")
        if chain is not None and chain[0].inputs[0] is source:
            return place.box(tensor).ends == place.box(x).ends
    return tensor is x


def _chain(tensor: gs.Tensor, *ops: str) -> list[gs.Node] | None:
    """The node that makes a tensor, the one that makes its first input, and so on, if these are.

    Args:
        tensor: Where to begin.
        ops: Their operators.
    """
    nodes = []
    for op in ops:
        node = producer(tensor)
        if node is None or node.op != op:
            return None
        nodes.append(node)
        tensor = node.inputs[0]
    return nodes


RELATIONS: Mapping[str, tuple[Relation, ...]] = {
    "Div": (_step,),
    "Sub": (_below_maximum, _remainder),
    "Where": (_extreme,),
}
"""Operator -> its relations."""
