"""Operators that pick or place elements by index: gathers, scatters, one-hot, masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["none", "add", "mul", "max", "min"]
_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _wrapped(index: Tensor, length: int) -> Tensor:
    index = index.long()
    return torch.where(index < 0, index + length, index)


def _gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.ndim
    picked = x.index_select(axis, _wrapped(indices, x.shape[axis]).reshape(-1))
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    batch = x.shape[:batch_dims]
    flat = x.reshape(-1, *x.shape[batch_dims:])
    places = indices.reshape(flat.shape[0], -1, indices.shape[-1]).long()
    rows = torch.arange(flat.shape[0], device=x.device)[:, None].expand(places.shape[:2])
    picked = flat[(rows, *places.unbind(-1))]
    return picked.reshape(*batch, *indices.shape[batch_dims:-1], *picked.shape[2:])


def _scatter_nd(
    x: Tensor, indices: Tensor, updates: Tensor, *, reduction: Reduction = "none"
) -> Tensor:
    places = [_wrapped(p.reshape(-1), n) for p, n in zip(indices.unbind(-1), x.shape, strict=False)]
    row = torch.zeros_like(places[0])
    for place, length in zip(places, x.shape, strict=False):
        row = row * length + place
    rest = x.shape[len(places) :]
    flat, new = x.reshape(-1, *rest), updates.reshape(-1, *rest)
    if reduction == "none":
        return flat.index_copy(0, row, new).reshape(x.shape)
    row = row.reshape(-1, *(1,) * len(rest)).expand(new.shape)
    return flat.scatter_reduce(0, row, new, _REDUCTIONS[reduction]).reshape(x.shape)


def _scatter_elements(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: Reduction = "none"
) -> Tensor:
    places = _wrapped(indices, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, places, updates)
    return torch.scatter_reduce(x, axis, places, updates, _REDUCTIONS[reduction])


def _one_hot(indices: Tensor, depth: float, values: Tensor, *, axis: int = -1) -> Tensor:
    classes = torch.arange(int(depth), device=indices.device)
    hot = _wrapped(indices, int(depth)).unsqueeze(-1) == classes  # nothing where out of range
    return torch.where(hot.movedim(-1, axis), values[1], values[0])


def _reverse_sequence(
    x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0
) -> Tensor:
    x = x.movedim((batch_axis, time_axis), (0, 1))
    time = torch.arange(x.shape[1], device=x.device)
    source = torch.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[rows, source].movedim((0, 1), (batch_axis, time_axis))


def _compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, condition.nonzero()[:, 0])


def _non_zero(x: Tensor) -> Tensor:
    return x.nonzero().T


OPS: dict[str, Callable[..., Tensor]] = {
    "Compress": _compress,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "ReverseSequence": _reverse_sequence,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
}
