"""LSTM, GRU and RNN, unrolled step by step, differentiable in everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Direction = Literal["forward", "reverse", "bidirectional"]
State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State], State]
"""(projected input [batch, gates * hidden], state) -> new state; the output is its first tensor."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}
_REVERSED = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}


@dataclass(frozen=True)
class _Layer:
    """What the three operators have in common; tensors as ONNX lays them out."""

    x: Tensor
    weight: Tensor
    recurrence: Tensor
    bias: Tensor | None
    lengths: Tensor | None
    start: Sequence[Tensor | None]
    direction: Direction
    layout: int
    activations: Sequence[Callable[[Tensor], Tensor]]
    functions_each: int

    def biases(self, number: int) -> tuple[Tensor, Tensor]:
        """Input and recurrent bias [gates * hidden] of one direction."""
        if self.bias is None:
            zero = self.weight.new_zeros(self.weight.shape[1])
            return zero, zero
        wide, recurrent = self.bias[number].chunk(2)
        return wide, recurrent

    def functions(self, number: int) -> Sequence[Callable[[Tensor], Tensor]]:
        """The activation functions of one direction."""
        each = self.functions_each
        return self.activations[number * each : (number + 1) * each]

    def unroll(self, cell: Callable[[int], Cell]) -> tuple[Tensor, ...]:
        """Outputs [time, directions, batch, hidden], then final states; batch first in layout 1."""
        x = self.x.transpose(0, 1) if self.layout else self.x
        outputs, finals = [], []
        for number, reverse in enumerate(_REVERSED[self.direction]):
            projected = F.linear(x, self.weight[number], self.biases(number)[0])
            state = tuple(self._initial(s, number, x.shape[1]) for s in self.start)
            y, state = _scan(cell(number), projected, state, self.lengths, reverse)
            outputs.append(y)
            finals.append(state)
        y = torch.stack(outputs, 1)
        last = [torch.stack(each) for each in zip(*finals, strict=True)]
        if self.layout:
            return (y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in last))
        return (y, *last)

    def _initial(self, start: Tensor | None, number: int, batch: int) -> Tensor:
        if start is None:
            return self.x.new_zeros(batch, self.recurrence.shape[2])
        return start[:, number] if self.layout else start[number]


def _scan(
    cell: Cell, projected: Tensor, state: State, lengths: Tensor | None, reverse: bool
) -> tuple[Tensor, State]:
    """Run `cell` over time; past a sequence's length its state stays and its output is zero."""
    outputs: dict[int, Tensor] = {}
    times = range(projected.shape[0])
    for time in reversed(times) if reverse else times:
        new = cell(projected[time], state)
        if lengths is not None:
            alive = (lengths > time)[:, None]
            outputs[time] = torch.where(alive, new[0], torch.zeros_like(new[0]))
            new = tuple(torch.where(alive, n, s) for n, s in zip(new, state, strict=True))
        else:
            outputs[time] = new[0]
        state = new
    return torch.stack([outputs[time] for time in times]), state


def _functions(names: Sequence[str]) -> list[Callable[[Tensor], Tensor]]:
    if unknown := sorted({n for n in names if n.lower() not in _ACTIVATIONS}):
        raise ValueError(f"activation {unknown[0]}; expected one of {', '.join(_ACTIVATIONS)}")
    return [_ACTIVATIONS[n.lower()] for n in names]


def _lstm_cell(layer: _Layer, peephole: Tensor | None, input_forget: int, number: int) -> Cell:
    gate, candidate, output = layer.functions(number)
    recurrence, bias = layer.recurrence[number], layer.biases(number)[1]
    missing = bias.new_zeros(3 * recurrence.shape[1])
    peep_i, peep_o, peep_f = (missing if peephole is None else peephole[number]).chunk(3)

    def step(inputs: Tensor, state: State) -> State:
        h, c = state
        i, o, f, g = (inputs + F.linear(h, recurrence, bias)).chunk(4, -1)
        i = gate(i + peep_i * c)
        f = 1 - i if input_forget else gate(f + peep_f * c)
        c = f * c + i * candidate(g)
        return gate(o + peep_o * c) * output(c), c

    return step


def _gru_cell(layer: _Layer, linear_before_reset: int, number: int) -> Cell:
    gate, candidate = layer.functions(number)
    size = layer.recurrence.shape[2]
    gates, only = torch.split(layer.recurrence[number], [2 * size, size])
    gates_bias, only_bias = torch.split(layer.biases(number)[1], [2 * size, size])

    def step(inputs: Tensor, state: State) -> State:
        (h,) = state
        update_reset, g = torch.split(inputs, [2 * size, size], -1)
        z, r = gate(update_reset + F.linear(h, gates, gates_bias)).chunk(2, -1)
        if linear_before_reset:
            g = candidate(g + r * F.linear(h, only, only_bias))
        else:
            g = candidate(g + F.linear(r * h, only, only_bias))
        return ((1 - z) * g + z * h,)

    return step


def _rnn_cell(layer: _Layer, number: int) -> Cell:
    (activation,) = layer.functions(number)
    recurrence, bias = layer.recurrence[number], layer.biases(number)[1]
    return lambda inputs, state: (activation(inputs + F.linear(state[0], recurrence, bias)),)


def _lstm(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    memory: Tensor | None = None,
    peephole: Tensor | None = None,
    *,
    activations: Sequence[str] = ("Sigmoid", "Tanh", "Tanh") * 2,
    direction: Direction = "forward",
    hidden_size: int | None = None,  # noqa: ARG001
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    functions = _functions(activations)
    start = (hidden, memory)
    layer = _Layer(x, weight, recurrence, bias, lengths, start, direction, layout, functions, 3)
    return layer.unroll(lambda number: _lstm_cell(layer, peephole, input_forget, number))


def _gru(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    *,
    activations: Sequence[str] = ("Sigmoid", "Tanh") * 2,
    direction: Direction = "forward",
    hidden_size: int | None = None,  # noqa: ARG001
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    functions = _functions(activations)
    start = (hidden,)
    layer = _Layer(x, weight, recurrence, bias, lengths, start, direction, layout, functions, 2)
    return layer.unroll(lambda number: _gru_cell(layer, linear_before_reset, number))


def _rnn(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    *,
    activations: Sequence[str] = ("Tanh", "Tanh"),
    direction: Direction = "forward",
    hidden_size: int | None = None,  # noqa: ARG001
    layout: int = 0,
) -> tuple[Tensor, ...]:
    functions = _functions(activations)
    start = (hidden,)
    layer = _Layer(x, weight, recurrence, bias, lengths, start, direction, layout, functions, 1)
    return layer.unroll(lambda number: _rnn_cell(layer, number))


OPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"GRU": _gru, "LSTM": _lstm, "RNN": _rnn}
