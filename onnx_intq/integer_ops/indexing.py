"""Operators that pick or place elements of any type by index: gathers, scatters, one-hot, masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from onnx_intq.integer_ops.arrays import Array, Function

Reduction = Literal["none", "add", "mul", "max", "min"]
_REDUCTIONS: Mapping[str, np.ufunc] = {
    "add": np.add,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
}


def _gather(x: Array, indices: Array, *, axis: int = 0) -> Array:
    return np.take(x, indices, axis)


def _gather_elements(x: Array, indices: Array, *, axis: int = 0) -> Array:
    return x[_places(indices, axis)]


def _places(indices: Array, axis: int) -> tuple[Array, ...]:
    """Where each element of `indices`, which stand along `axis`, lies in `x`."""
    grid: list[Array] = list(np.indices(indices.shape, sparse=True))
    grid[axis] = indices
    return tuple(grid)


def _gather_nd(x: Array, indices: Array, *, batch_dims: int = 0) -> Array:
    rows = [
        np.arange(size).reshape(-1, *(1,) * (indices.ndim - 2 - axis))
        for axis, size in enumerate(indices.shape[:batch_dims])
    ]
    found: Array = x[(*rows, *np.moveaxis(indices, -1, 0))]
    return found


def _scatter_nd(
    x: Array, indices: Array, updates: Array, *, reduction: Reduction = "none"
) -> Array:
    return _placed(x, tuple(np.moveaxis(indices, -1, 0)), updates, reduction)


def _scatter_elements(
    x: Array, indices: Array, updates: Array, *, axis: int = 0, reduction: Reduction = "none"
) -> Array:
    return _placed(x, _places(indices, axis), updates, reduction)


def _placed(x: Array, places: tuple[Array, ...], updates: Array, reduction: Reduction) -> Array:
    y = x.copy()
    if reduction == "none":
        y[places] = updates
    else:
        _REDUCTIONS[reduction].at(y, places, updates)
    return y


def _one_hot(indices: Array, depth: float, values: Array, *, axis: int = -1) -> Array:
    classes = np.arange(int(depth))
    wrapped = np.where(indices < 0, indices + int(depth), indices)
    hot: Array = np.equal(wrapped[..., None], classes)  # nothing where out of range
    placed: Array = np.where(np.moveaxis(hot, -1, axis), values[1], values[0])
    return placed


def _reverse_sequence(
    x: Array, lengths: Array, *, batch_axis: int = 1, time_axis: int = 0
) -> Array:
    x = np.moveaxis(x, (batch_axis, time_axis), (0, 1))
    time = np.arange(x.shape[1])
    source = np.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)
    reversed_: Array = x[np.arange(len(x))[:, None], source]
    return np.moveaxis(reversed_, (0, 1), (batch_axis, time_axis))


def _compress(x: Array, condition: Array, *, axis: int | None = None) -> Array:
    return np.compress(condition, x, axis)


def _non_zero(x: Array) -> Array:
    return np.stack(np.nonzero(x)).astype(np.int64)


OPS: dict[str, Function] = {
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
