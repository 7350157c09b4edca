"""Emits the integer nodes of an LSTM layer: a product over all time, and a Scan of its steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.grid import Grid, quantize
from onnx_intq.kernels.exponential import Mode
from onnx_intq.kernels.lstm import Cell, Gates
from onnx_intq.lowering import CannotLowerError, Operand
from onnx_intq.lstm_layer import Direction, Layer, State
from onnx_intq.moving import regrid
from onnx_intq.place_values import digits, total
from onnx_intq.products import Int64, unsigned
from onnx_intq.recurrent_states import octaves
from onnx_intq.trace import Builder, Value


def emit_layer(layer: Layer, builder: Builder, mode: Mode, *, signed: bool) -> list[gs.Tensor]:
    """The layer's three outputs: all hidden states, the last one, the last cell.

    Args:
        layer: What to emit.
        builder: Takes the nodes.
        mode: Of sigmoid and tanh.
        signed: Whether weights are int8, not uint8.

    Raises:
        CannotLowerError: A sum of products may leave its type.
    """
    found = [
        _Emission(layer, direction, number, builder, mode, signed=signed).outputs()
        for number, direction in enumerate(layer.directions)
    ]
    axes = 1, 0, 0
    return [
        _joined([each[place] for each in found], axis, builder) for place, axis in enumerate(axes)
    ]


def _joined(tensors: list[gs.Tensor], axis: int, builder: Builder) -> gs.Tensor:
    """Tensors of the directions, along a new axis."""
    dtype, axes = tensors[0].dtype, builder.constant([axis], np.int64)
    raised = []
    for tensor in tensors:
        shape = list(tensor.shape)
        shape.insert(axis, 1)
        raised.append(builder.node("Unsqueeze", [tensor, axes], dtype, shape))
    if len(raised) == 1:
        return raised[0]
    shape = [len(raised) if i == axis else n for i, n in enumerate(raised[0].shape)]
    return builder.node("Concat", raised, dtype, shape, axis=axis)


class _Emission:
    """Emits one direction of a layer."""

    def __init__(
        self,
        layer: Layer,
        direction: Direction,
        number: int,
        builder: Builder,
        mode: Mode,
        *,
        signed: bool,
    ) -> None:
        self._layer, self._direction, self._number = layer, direction, number
        self._builder, self._signed = builder, signed
        x, hidden = layer.x, layer.hidden
        self._reach = _reach(direction.recurrence, hidden.on(x.tensor))
        gates = Gates.of(
            x.scale * direction.weight_scales,
            hidden.scale * direction.recurrence_scales,
            direction.bias,
            (_largest(_reach(direction.weight, x)), _largest(self._reach)),
        )
        self._cell = Cell(
            gates=gates,
            octaves=octaves((0.0, layer.cell.scale * (1 << 15))),
            scale=hidden.scale,
            zero_point=hidden.zero_point,
            low=hidden.grid.low,
            high=hidden.grid.high,
            mode=mode,
        )

    def outputs(self) -> list[gs.Tensor]:
        """Hidden states [time, batch, hidden], the last one and the last cell [batch, hidden]."""
        shares = self._shares()
        states = [self._start(state) for state in (self._layer.hidden, self._layer.cell)]
        if shares.tensor.shape[0] != 1:
            return self._scan(shares, states)
        axes = self._builder.constant([0], np.int64)
        shape = shares.tensor.shape[1:]
        share = self._builder.node("Squeeze", [shares.tensor, axes], shares.dtype, shape)
        value = self._builder.value(share, shares.low, shares.high)
        h, c = self._step(self._builder, states, value)
        every = self._builder.node("Unsqueeze", [h, axes], h.dtype, [1, *h.shape])
        return [every, h, c]

    def _shares(self) -> Value:
        """The input's part of the gates at all times, [time, batch, 4 hidden]."""
        x, w, terms = self._layer.x, self._direction.weight, []
        shape = x.tensor.shape
        if shape is None:
            raise CannotLowerError(f"the rank of its input {x.tensor.name!r} is unknown")
        for digit in digits(_unsigned(x, self._builder), self._builder):
            part = digit.operand
            low, high = _reach(w, part)
            acc = self._product(self._builder, part.tensor, part.zero_point, w, shape[:-1])
            terms.append((digit.place, self._builder.value(acc, low, high)))
        found: Any = total(terms, *_reach(w, x))
        share: Value = self._cell.gates.of_input(found)
        return share

    def _product(
        self, builder: Builder, x: gs.Tensor, zero_point: int, w: Int64, shape: Any
    ) -> gs.Tensor:
        stored, zero = (w.T.astype(np.int8), 0) if self._fits_int8() else unsigned(w.T)
        inputs = [
            x,
            builder.constant(stored, stored.dtype),
            builder.constant(zero_point, np.uint8),
            builder.constant(zero, stored.dtype),
        ]
        return builder.node("MatMulInteger", inputs, np.int32, [*shape, len(w)])

    def _fits_int8(self) -> bool:
        w, r = self._direction.weight, self._direction.recurrence
        ends = (w.min(), w.max(), r.min(), r.max())
        return self._signed and min(ends) >= -128 and max(ends) <= 127

    def _start(self, state: State) -> gs.Tensor:
        """A state before the first step, [batch, hidden], on its own grid."""
        builder, width = self._builder, self._layer.width
        batch = self._layer.x.tensor.shape[1]
        if state.fixed is not None:
            values = state.fixed[self._number]
            return builder.constant(
                quantize(values, state.scale, state.zero_point, state.grid), state.grid.dtype
            )
        if state.start is None:
            return self._zeros(state, [batch, width])
        value = regrid(state.start, state.on(state.start.tensor), builder)
        tensor = value.astype(state.grid.dtype)
        index = builder.constant(self._number, np.int64)
        return builder.node("Gather", [tensor, index], tensor.dtype, [batch, width], axis=0)

    def _zeros(self, state: State, shape: list[int | str]) -> gs.Tensor:
        builder, dtype = self._builder, state.grid.dtype
        x = self._layer.x.tensor
        batch = builder.node("Shape", [x], np.int64, [1], start=1, end=2)
        width = builder.constant([self._layer.width], np.int64)
        size = builder.node("Concat", [batch, width], np.int64, [2], axis=0)
        value = gs.Constant("", np.full(1, state.zero_point, dtype))
        return builder.node("ConstantOfShape", [size], dtype, shape, value=value)

    def _scan(self, shares: Value, states: list[gs.Tensor]) -> list[gs.Tensor]:
        """Steps over time, in the body of a Scan."""
        outer, (time, *shape) = self._builder, shares.tensor.shape
        body = gs.Graph(opset=outer.graph.opset, name=f"{outer.name}_step")
        inner = Builder(body, outer.names, {}, name=f"{outer.name}_step")
        body.inputs = [_like(outer, t.dtype, t.shape) for t in states]
        body.inputs.append(_like(outer, shares.dtype, shape))
        *before, share = body.inputs
        h, c = self._step(inner, before, inner.value(share, shares.low, shares.high))
        body.outputs = [h, c, inner.node("Identity", [h], h.dtype, h.shape)]
        backwards = {"scan_input_directions": [1], "scan_output_directions": [1]}
        last_h = outer.node(
            "Scan",
            [*states, shares.tensor],
            h.dtype,
            h.shape,
            body=body,
            num_scan_inputs=1,
            **(backwards if self._direction.reverse else {}),
        )
        last_c, every = _like(outer, c.dtype, c.shape), _like(outer, h.dtype, [time, *h.shape])
        last_h.inputs[0].outputs += [last_c, every]
        return [every, last_h, last_c]

    def _step(
        self, builder: Builder, states: list[gs.Tensor], share: Value
    ) -> tuple[gs.Tensor, gs.Tensor]:
        h, c = states
        hidden, cell = self._layer.hidden, self._layer.cell
        recurrence = self._direction.recurrence
        products = self._product(builder, h, hidden.zero_point, recurrence, h.shape[:-1])
        value = total([(1, builder.value(products, *self._reach))], *self._reach)
        grid = cell.grid
        new_h, new_c = self._cell.step(share, value, builder.value(c, grid.low, grid.high))
        return new_h.astype(hidden.grid.dtype), new_c.astype(grid.dtype)


def _like(builder: Builder, dtype: Any, shape: Any) -> gs.Variable:
    return gs.Variable(builder.names.number("t"), dtype=dtype, shape=shape)


def _unsigned(x: Operand, builder: Builder) -> Operand:
    """The same values as uint8; those of 16 bits are taken apart later."""
    if x.grid.bits > 8 or not x.grid.signed:
        return x
    tensor = (x.stored(builder) + 128).astype(np.uint8)
    return replace(x, tensor=tensor, zero_point=x.zero_point + 128, grid=Grid(8, signed=False))


def _reach(w: Int64, x: Operand) -> tuple[int, int]:
    """The lowest and the highest sum of a row's products with `x` less its zero point."""
    ends = [w * (end - x.zero_point) for end in (x.grid.low, x.grid.high)]
    return int(np.minimum(*ends).sum(axis=1).min()), int(np.maximum(*ends).sum(axis=1).max())


def _largest(reach: tuple[int, int]) -> int:
    return max(-reach[0], reach[1], 0)
