"""Which tensors hold the states of LSTM nodes, and the one grid each state has wherever it is held.

A state that a model gives and takes again must mean the same on both sides: initial states, final
ones, and what they are moved to or joined into share a grid. A hidden state has 8 bits; a cell has
16, zero point 0 and a power of two for scale, which the LSTM's integer form wants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import producer
from onnx_intq.grid import Grid, affine
from onnx_intq.lowering import Operand, constant_values, parameters
from onnx_intq.moving import sources
from onnx_intq.placement import MOVING
from onnx_intq.qdq import QUANTIZE, has_input
from onnx_intq.ranges import HEADROOM
from onnx_intq.transform import Range

OPERATOR = "LSTM"
HIDDEN, CELL = 5, 6
"""Inputs of an LSTM that are initial states."""
HIDDEN_GRID, CELL_GRID = Grid(8, signed=False), Grid(16, signed=True)
WIDEST: Range = (-1.0, 1.0)
"""A sigmoid times a tanh lies there."""
OCTAVES = 2, 15
"""Least and most m of a cell: from 2 on, its products have 64 bits, and room beside them."""
Limits = Callable[[str, int], Range | None]
"""A tensor's name and the bits it will have -> its calibrated range."""


def octaves(limits: Range) -> int:
    """The m, 2 to 15, for a cell in this range: its 16 bits reach from -2^m to 2^m."""
    largest = max(abs(limits[0]), abs(limits[1]), 1.0)
    return int(np.clip(math.ceil(math.log2(largest)), *OCTAVES))


def cell_scale(m: int) -> float:
    """Real units per step of a cell that reaches from -2^m to 2^m."""
    return 2.0 ** (m - 15)


def state_ranges(model: gs.Graph, limits: Limits) -> dict[int, Range]:
    """The range of every hidden state, by the tensor's `id`: of all that it shares a grid with.

    Where nothing was calibrated, what a hidden state can hold at most.
    """
    return {
        id(tensor): _joined(group, limits, 8) or WIDEST
        for group in _groups(model, _hidden)
        for tensor in group
    }


def state_grids(model: gs.Graph, limits: Limits) -> dict[int, Operand]:
    """The grid of every state, by the `id` of the tensor; cells of unknown range are left out.

    A hidden state that is quantized already, to 8 bits, keeps that grid. A cell gets no headroom
    but that to the next power of two: from 4 on, one that is cut off there changes no tanh.
    """
    found: dict[int, Operand] = {}
    for group in _groups(model, _hidden):
        grid = _given(group) or hidden_grid(_joined(group, limits, 8) or WIDEST, group[0])
        found |= dict.fromkeys(map(id, group), grid)
    for group in _groups(model, _cells):
        reach = _joined(group, limits, 16)
        if reach is not None:
            scale = cell_scale(octaves((reach[0] / HEADROOM, reach[1] / HEADROOM)))
            grid = Operand(tensor=group[0], scale=scale, zero_point=0, grid=CELL_GRID)
            found |= dict.fromkeys(map(id, group), grid)
    return found


def hidden_grid(limits: Range, tensor: gs.Tensor) -> Operand:
    """A tensor as a hidden state within these limits."""
    scale, zero_point = affine(*limits, HIDDEN_GRID)
    return Operand(tensor=tensor, scale=float(scale), zero_point=zero_point, grid=HIDDEN_GRID)


def _given(group: Iterable[gs.Tensor]) -> Operand | None:
    """The grid on which a tensor of the group is quantized already, as unsigned integers."""
    for node in (n for tensor in group for n in tensor.outputs if n.op == QUANTIZE):
        known = parameters(node, node.outputs[0])
        if known is not None and known.grid.bits == HIDDEN_GRID.bits:
            zero_point = known.zero_point - known.grid.low
            return Operand(
                tensor=known.tensor, scale=known.scale, zero_point=zero_point, grid=HIDDEN_GRID
            )
    return None


def _joined(group: Iterable[gs.Tensor], limits: Limits, bits: int) -> Range | None:
    found = [known for t in group if (known := limits(t.name, bits)) is not None]
    if not found:
        return None
    lows, highs = zip(*found, strict=True)
    return min(lows), max(highs)


def _hidden(node: gs.Node) -> list[gs.Tensor]:
    return [*node.outputs[:2], *_given_input(node, HIDDEN)]


def _cells(node: gs.Node) -> list[gs.Tensor]:
    return [*node.outputs[2:3], *_given_input(node, CELL)]


def _given_input(node: gs.Node, index: int) -> list[gs.Tensor]:
    given = has_input(node, index) and constant_values(node.inputs[index]) is None
    return [node.inputs[index]] if given else []


def _groups(model: gs.Graph, states: Callable[[gs.Node], list[gs.Tensor]]) -> list[list[gs.Tensor]]:
    """Tensors that hold one state, or several that are joined: one list for each grid."""
    sets = _Sets()
    for node in (n for n in model.nodes if n.op == OPERATOR):
        held = [t for t in states(node) if not t.is_empty()]
        sets.join(held)
        for tensor in held:
            _climb(tensor, sets)
    for node in model.nodes:  # in order, so that what is made of states is known by then
        moved = [t for t in sources(node) if constant_values(t) is None]
        if moved and all(t in sets for t in moved):
            sets.join([*moved, *node.outputs])
    return sets.groups()


def _climb(tensor: gs.Tensor, sets: _Sets) -> None:
    """Join an initial state with what it is a part of."""
    maker = producer(tensor)
    while maker is not None and maker.op in MOVING:
        sets.join([maker.inputs[0], *maker.outputs])
        maker = producer(maker.inputs[0])


class _Sets:
    """Disjoint sets of tensors."""

    def __init__(self) -> None:
        self._sets: dict[int, list[gs.Tensor]] = {}

    def __contains__(self, tensor: gs.Tensor) -> bool:
        return id(tensor) in self._sets

    def join(self, tensors: Iterable[gs.Tensor]) -> None:
        """Put tensors, and all that are in a set with one of them, into one set."""
        held = {id(t): t for tensor in tensors for t in self._sets.get(id(tensor), [tensor])}
        merged = list(held.values())
        self._sets |= dict.fromkeys(held, merged)

    def groups(self) -> list[list[gs.Tensor]]:
        """The sets."""
        return list({id(group): group for group in self._sets.values()}.values())


def is_cell_grid(known: Operand) -> bool:
    """Whether a grid is one that a cell may have."""
    scales = [cell_scale(m) for m in range(OCTAVES[0], OCTAVES[1] + 1)]
    return known.grid == CELL_GRID and not known.zero_point and known.scale in scales
