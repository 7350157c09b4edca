"""Reads an LSTM node between Q/DQ nodes: weights as integers, grids of its states, options."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.grid import Grid
from onnx_intq.lowering import CannotLowerError, Operand, Site, parameters
from onnx_intq.products import Int64, weight
from onnx_intq.qdq import QUANTIZE, has_input
from onnx_intq.recurrent_states import (
    CELL,
    CELL_GRID,
    HIDDEN,
    HIDDEN_GRID,
    WIDEST,
    cell_scale,
    hidden_grid,
    is_cell_grid,
    octaves,
)

DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
"""Attribute -> whether each direction goes from the end to the start."""
ACTIVATIONS = ["sigmoid", "tanh", "tanh"]
UNKNOWN_CELL = 4
"""m of a cell that nobody reads and that starts at 0: -16 .. 16, where tanh has long ended."""


@dataclass(frozen=True, kw_only=True)
class Direction:
    """The weights of one direction.

    Attributes:
        reverse: Whether it goes from the end to the start.
        weight: int64 [4 hidden, inputs], zero points taken off; gates in the order i, o, f, g.
        recurrence: int64 [4 hidden, hidden].
        weight_scales: float64 [4 hidden], real units per step.
        recurrence_scales: float64 [4 hidden].
        bias: float64 [4 hidden], that of input and recurrence together.
    """

    reverse: bool
    weight: Int64
    recurrence: Int64
    weight_scales: npt.NDArray[np.float64]
    recurrence_scales: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class State:
    """What a state means: its scale, zero point and integers, wherever it is.

    Attributes:
        scale: Real units per step.
        zero_point: The integer of real 0.
        grid: Its integers.
        start: It at the first step, on any grid; None for zeros.
        fixed: It at the first step where that is constant, real [directions, batch, hidden].
    """

    scale: float
    zero_point: int
    grid: Grid
    start: Operand | None
    fixed: npt.NDArray[Any] | None

    def on(self, tensor: gs.Tensor) -> Operand:
        """A tensor of these integers."""
        return Operand(tensor=tensor, scale=self.scale, zero_point=self.zero_point, grid=self.grid)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """An LSTM node.

    Attributes:
        x: Its input [time, batch, inputs].
        directions: One or two.
        hidden: Its hidden state.
        cell: Its cell.
    """

    x: Operand
    directions: tuple[Direction, ...]
    hidden: State
    cell: State

    @property
    def width(self) -> int:
        """Of a state."""
        return int(self.directions[0].recurrence.shape[1])


def layer_at(site: Site) -> Layer:
    """The layer that heads a place.

    Raises:
        CannotLowerError: It has no integer form.
    """
    node = site.node
    _check_options(node)
    hidden, cell = _outputs(node, range(2)), _outputs(node, range(2, 3))
    return Layer(
        x=site.operand(0),
        directions=tuple(_directions(site)),
        hidden=_hidden(_start(site, HIDDEN), hidden),
        cell=_cell(_start(site, CELL), cell),
    )


def _check_options(node: gs.Node) -> None:
    attrs = node.attrs
    names = [name.lower() for name in attrs.get("activations", ACTIVATIONS)]
    count = len(DIRECTIONS[attrs.get("direction", "forward")])
    for refused, what in (
        (has_input(node, 4), "it takes the lengths of its sequences"),
        (has_input(node, 7), "it has peepholes"),
        (attrs.get("clip"), "it clips its gates"),
        (attrs.get("input_forget"), "its forget gate is coupled to its input gate"),
        (attrs.get("layout"), "its input has the batch first"),
        (names not in (ACTIVATIONS, ACTIVATIONS * count), f"its activations are {names}"),
    ):
        if refused:
            raise CannotLowerError(f"{what}; expected an LSTM without that option")


def _directions(site: Site) -> Iterable[Direction]:
    w, r = (weight(site.node.inputs[i]) for i in (1, 2))
    bias = site.values(3)
    if bias is None and has_input(site.node, 3):
        raise CannotLowerError("its bias is computed at run time")
    for number, reverse in enumerate(DIRECTIONS[site.node.attrs.get("direction", "forward")]):
        rows = w.centred.shape[1]
        summed = np.zeros(rows) if bias is None else bias[number].reshape(2, rows).sum(axis=0)
        scales = [_rows(each.scales, each.axis, rows, number) for each in (w, r)]
        yield Direction(
            reverse=reverse,
            weight=w.centred[number],
            recurrence=r.centred[number],
            weight_scales=scales[0],
            recurrence_scales=scales[1],
            bias=summed.astype(np.float64),
        )


def _rows(
    scales: npt.NDArray[np.float64], axis: int, rows: int, number: int
) -> npt.NDArray[np.float64]:
    """The scales of one direction's rows; they may be per row, per direction, or one."""
    if scales.size > 1 and axis > 1:
        raise CannotLowerError("its weight has scales along the axis that is summed")
    if scales.size > 1 and axis == 0:
        scales = scales[number]
    return np.broadcast_to(scales, (rows,))


def _outputs(node: gs.Node, places: range) -> list[Operand]:
    """The grids on which outputs are quantized."""
    readers = [n for i in places for t in node.outputs[i : i + 1] for n in t.outputs]
    found = [parameters(n, n.outputs[0]) for n in readers if n.op == QUANTIZE]
    return [each for each in found if each is not None]


def _start(site: Site, index: int) -> tuple[Operand | None, npt.NDArray[Any] | None]:
    """An initial state as integers, or as the real values it always has."""
    if not has_input(site.node, index):
        return None, None
    values = site.values(index)
    return (None, values) if values is not None else (site.operand(index), None)


def _hidden(start: tuple[Operand | None, npt.NDArray[Any] | None], outputs: list[Operand]) -> State:
    known = [each for each in (start[0], *outputs) if each is not None and each.grid.bits == 8]
    first = known[0] if known else hidden_grid(WIDEST, gs.Variable.empty())
    return State(
        scale=first.scale,
        zero_point=first.zero_point - first.grid.low,
        grid=HIDDEN_GRID,
        start=start[0],
        fixed=start[1],
    )


def _cell(start: tuple[Operand | None, npt.NDArray[Any] | None], outputs: list[Operand]) -> State:
    """The first grid that suits a cell, else one that holds the widest."""
    known = [each for each in (start[0], *outputs) if each is not None]
    suiting = [each.scale for each in known if is_cell_grid(each)]
    m = max((octaves((each.low, each.high)) for each in known), default=UNKNOWN_CELL)
    scale = suiting[0] if suiting else cell_scale(m)
    return State(scale=scale, zero_point=0, grid=CELL_GRID, start=start[0], fixed=start[1])
