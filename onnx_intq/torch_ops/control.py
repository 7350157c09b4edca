"""If and Loop: operators whose attributes are graphs, here given as callables on named tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Body = Callable[[dict[str, Tensor]], list[Tensor]]
"""Runs a body on its inputs and the outer tensors it reads, by name; returns its outputs."""


def branch(
    condition: bool, *outer: Tensor, names: Sequence[str], then: Body, other: Body
) -> tuple[Tensor, ...]:
    """`If`: one of two bodies, on the outer tensors `outer` called `names`."""
    return tuple((then if condition else other)(dict(zip(names, outer, strict=True))))


def loop(
    trips: int | None,
    condition: bool | None,
    *tensors: Tensor,
    names: Sequence[str],
    inputs: Sequence[str],
    body: Body,
) -> tuple[Tensor, ...]:
    """`Loop`: the body's `inputs` are iteration, condition and states, and again for each turn.

    Args:
        trips: Most turns, None for no limit.
        condition: Whether to begin, None for yes.
        tensors: The initial states, then the outer tensors called `names`.
        names: Outer names the body reads.
        inputs: The body's own inputs.
        body: Returns the condition, the states and what to stack.

    Returns:
        The last states, then each stacked output; these are empty after no turn at all.
    """
    count = len(inputs) - 2
    state, outer = list(tensors[:count]), dict(zip(names, tensors[count:], strict=True))
    rows: list[list[Tensor]] = []
    turn = 0
    while condition is not False and (trips is None or turn < trips):
        given = [torch.tensor(turn), torch.tensor(True), *state]
        again, *results = body(outer | dict(zip(inputs, given, strict=True)))
        condition = bool(again.reshape(()).tolist())
        state, row = results[:count], results[count:]
        rows.append(row)
        turn += 1
    return (*state, *(torch.stack(column) for column in zip(*rows, strict=True)))
