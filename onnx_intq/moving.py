"""Operators that move values or choose among them: whose values they hold, and on which grid.

Rounding to a grid keeps order and works on every element alone, so it may be done before a move as
well as behind it: the integers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.grid import Dyadic, dyadic, quantize
from onnx_intq.lowering import Operand, constant_values, operand
from onnx_intq.placement import MOVING
from onnx_intq.requantization import Step, emit
from onnx_intq.value import Builder, Value

JOINING: Mapping[str, int] = {"Concat": 0, "Where": 1, "Max": 0, "Min": 0}
"""Operators whose results hold values of several inputs -> the first of these."""


def places(node: gs.Node) -> range:
    """Which inputs hold the values that the results of `node` hold; none if it computes others."""
    if node.op in MOVING:
        return range(1)
    return range(JOINING[node.op], len(node.inputs)) if node.op in JOINING else range(0)


def sources(node: gs.Node) -> list[gs.Tensor]:
    """The inputs at `places`."""
    return [node.inputs[i] for i in places(node)]


def common_grid(node: gs.Node) -> Operand | None:
    """The grid of all of `sources`; None where they have several, or a constant leaves it."""
    found = [operand(t) for t in sources(node) if constant_values(t) is None]
    first = found[0] if found else None
    if first is None or any(other is None or not first.same_grid(other) for other in found):
        return None
    padding = node.inputs[2:3] if node.op == "Pad" else []
    filled = [constant_values(t) for t in (*sources(node), *padding)]
    constants = [values for values in filled if values is not None and values.size]
    inside = all(first.low <= v.min() and v.max() <= first.high for v in constants)
    return first if inside else None


def carries(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether the results of `node` hold values of `tensor` and of constants alone."""
    computed = [t for t in sources(node) if constant_values(t) is None]
    return bool(computed) and all(t is tensor for t in computed)


def users(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """The nodes that compute with a tensor's values, be they moved or joined by constants before.

    Joined with other computed values, they need a grid of their own.
    """
    for node in tensor.outputs:
        if carries(node, tensor):
            for output in node.outputs:
                yield from users(output)
        else:
            yield node


def regrid(
    x: Operand, target: Operand, builder: Builder, first: int | None = None, last: int | None = None
) -> Value:
    """The integers of `x` on the grid of `target`, cut to first..last; rounded once, half up.

    Args:
        x: What to requantise.
        target: Gives scale, zero point and type.
        builder: Takes the nodes; none are needed where the grids are the same.
        first: The lowest result, the grid's by default.
        last: The highest.
    """
    low = target.grid.low if first is None else first
    high = target.grid.high if last is None else last
    q: Any = x.stored(builder)
    if x.scale == target.scale:
        offset = target.zero_point - x.zero_point
        moved = np.clip(q + offset if offset else q, low, high)
        return builder.value(moved.astype(target.grid.dtype), low, high)
    found = dyadic([x.scale / target.scale], 62 - target.grid.bits)
    step = Step(
        multiplier=Dyadic(found.b, found.c),
        bias=np.array([-x.zero_point], np.int64),
        low=np.array([x.grid.low], np.int64),
        high=np.array([x.grid.high], np.int64),
        zero_point=target.zero_point,
        first=low,
        last=high,
    )
    return emit(q, step, target.grid, ())


def constant_on(
    values: npt.NDArray[Any], target: Operand, builder: Builder, first: int, last: int
) -> gs.Constant:
    """Float constants as integers on the grid of `target`, cut to first..last."""
    grid = target.grid
    integers = quantize(values, target.scale, target.zero_point, grid)
    return builder.constant(np.clip(integers, first, last), grid.dtype)
