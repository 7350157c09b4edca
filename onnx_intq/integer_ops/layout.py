"""Operators that make or rearrange tensors of any type: shapes, slices, padding, transposition."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.integer_ops.arrays import Array, Function, numpy_dtype


def _shape(x: Array, *, start: int = 0, end: int | None = None) -> Array:
    return np.array(x.shape[start:end], np.int64)


def _size(x: Array) -> Array:
    return np.array(x.size, np.int64)


def _reshape(x: Array, shape: list[int], *, allowzero: int = 0) -> Array:
    if not allowzero:
        shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
    return x.reshape(shape)


def _flatten(x: Array, *, axis: int = 1) -> Array:
    start = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:start]), math.prod(x.shape[start:]))


def _squeeze(x: Array, axes: list[int] | None = None) -> Array:
    return np.squeeze(x, None if axes is None else tuple(axes))


def _unsqueeze(x: Array, axes: list[int]) -> Array:
    return np.expand_dims(x, tuple(axes))


def _transpose(x: Array, *, perm: list[int] | None = None) -> Array:
    return np.transpose(x, perm)


def _expand(x: Array, shape: list[int]) -> Array:
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape)))


def _tile(x: Array, repeats: list[int]) -> Array:
    return np.tile(x, repeats)


def _concat(*arrays: Array, axis: int = 1) -> Array:
    return np.concatenate(arrays, axis)


def _split(
    x: Array,
    split: list[int] | None = None,
    *,
    axis: int = 0,
    num_outputs: int = 0,
    outputs: int,
) -> tuple[Array, ...]:
    if split is None:
        parts = num_outputs or outputs
        split = [-(-x.shape[axis] // parts)] * parts  # the last may be shorter
    return tuple(np.split(x, np.cumsum(split)[:-1], axis))


def _slice(
    x: Array,
    starts: list[int],
    ends: list[int],
    axes: list[int] | None = None,
    steps: list[int] | None = None,
) -> Array:
    axes = axes if axes is not None else list(range(len(starts)))
    cuts = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(axes), strict=True):
        cuts[axis] = _cut(x.shape[axis], start, end, step)
    return x[tuple(cuts)]


def _cut(length: int, start: int, end: int, step: int) -> slice:
    """ONNX's slice as Python's; going backwards, ONNX never starts before the first element."""
    start, end = (n + length if n < 0 else n for n in (start, end))
    if step > 0:
        return slice(max(start, 0), max(end, 0), step)
    return slice(max(start, 0), end if end >= 0 else None, step)


def _pad(
    x: Array,
    pads: list[int],
    value: float = 0,
    axes: list[int] | None = None,
    *,
    mode: Literal["constant", "edge", "reflect", "wrap"] = "constant",
) -> Array:
    axes = axes if axes is not None else list(range(x.ndim))
    sides, cuts = [(0, 0)] * x.ndim, [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        begin, end = pads[i], pads[i + len(axes)]
        sides[axis] = max(begin, 0), max(end, 0)
        cuts[axis] = slice(max(-begin, 0), x.shape[axis] + min(end, 0))
    x = x[tuple(cuts)]
    if mode == "constant":
        return np.pad(x, sides, constant_values=value)
    return np.pad(x, sides, mode)


def _constant_of_shape(shape: list[int], *, value: gs.Constant | None = None) -> Array:
    fill: Array = np.zeros(1, np.float32) if value is None else value.values
    return np.full(shape, fill[0], fill.dtype)


def _range(start: Array, limit: Array, delta: Array) -> Array:
    steps = -((start - limit) // delta) if delta > 0 else -((limit - start) // -delta)
    return (start + np.arange(max(int(steps), 0)) * delta).astype(start.dtype)


def _eye_like(x: Array, *, dtype: int = 0, k: int = 0) -> Array:
    rows, columns = x.shape
    return np.eye(rows, columns, k, dtype=numpy_dtype(dtype) if dtype else x.dtype)


def _trilu(x: Array, k: int = 0, *, upper: int = 1) -> Array:
    return np.triu(x, k) if upper else np.tril(x, k)


def _depth_to_space(x: Array, *, blocksize: int, mode: Literal["CRD", "DCR"] = "DCR") -> Array:
    n, c, h, w = x.shape
    size, depth = blocksize, c // blocksize**2
    if mode == "CRD":
        x = x.reshape(n, depth, size, size, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        x = x.reshape(n, size, size, depth, h, w).transpose(0, 3, 4, 1, 5, 2)
    return x.reshape(n, depth, h * size, w * size)


def _space_to_depth(x: Array, *, blocksize: int, mode: Literal["CRD", "DCR"] = "DCR") -> Array:
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.transpose(order).reshape(n, -1, h // blocksize, w // blocksize)


OPS: dict[str, Function] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
