"""Operators that make or rearrange tensors: shapes, slices, padding, transposition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnx_intq.torch_ops.dtypes import tensor_from_numpy, torch_dtype


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    # On the CPU wherever x is: shape arithmetic then never waits for an accelerator.
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def _size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


def _reshape(x: Tensor, shape: list[int], *, allowzero: int = 0) -> Tensor:
    if not allowzero:
        shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
    return x.reshape(shape)


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    start = axis + x.ndim if axis < 0 else axis
    rows = torch.Size(x.shape[:start]).numel()
    return x.reshape(rows, torch.Size(x.shape[start:]).numel())


def _squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(x: Tensor, axes: list[int]) -> Tensor:
    for axis in sorted(a % (x.ndim + len(axes)) for a in axes):
        x = x.unsqueeze(axis)
    return x


def _transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(*(perm if perm is not None else reversed(range(x.ndim))))


def _expand(x: Tensor, shape: list[int]) -> Tensor:
    return x.expand(np.broadcast_shapes(x.shape, tuple(shape)))


def _tile(x: Tensor, repeats: list[int]) -> Tensor:
    return x.repeat(repeats)


def _concat(*tensors: Tensor, axis: int = 1) -> Tensor:
    return torch.cat(tensors, axis)


def _split(
    x: Tensor,
    split: list[int] | None = None,
    *,
    axis: int = 0,
    num_outputs: int = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    if split is None:
        length, parts = x.shape[axis], num_outputs or outputs
        size = -(-length // parts)
        split = [max(0, min(size, length - size * i)) for i in range(parts)]
    return torch.split(x, split, axis)


def _slice(
    x: Tensor,
    starts: list[int],
    ends: list[int],
    axes: list[int] | None = None,
    steps: list[int] | None = None,
) -> Tensor:
    axes = axes if axes is not None else list(range(len(starts)))
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(axes), strict=True):
        picked = range(x.shape[axis])[start:end:step]
        if step > 0:
            x = x.narrow(axis, picked.start, max(picked.stop - picked.start, 0))
            x = x[(slice(None),) * (axis % x.ndim) + (slice(None, None, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(picked), device=x.device, dtype=torch.int64))
    return x


def _pad(
    x: Tensor,
    pads: list[int],
    value: float = 0.0,
    axes: list[int] | None = None,
    *,
    mode: Literal["constant", "edge", "reflect", "wrap"] = "constant",
) -> Tensor:
    axes = axes if axes is not None else list(range(x.ndim))
    sides = [(a % x.ndim, pads[i], pads[i + len(axes)]) for i, a in enumerate(axes)]
    if mode == "constant":
        amounts = [0] * (2 * x.ndim)
        for axis, before, after in sides:
            amounts[2 * (x.ndim - 1 - axis) : 2 * (x.ndim - axis)] = before, after
        return F.pad(x, amounts, value=value)
    for axis, before, after in sides:
        index = torch.arange(-before, x.shape[axis] + after, device=x.device)
        x = x.index_select(axis, _SOURCES[mode](index, x.shape[axis]))
    return x


def _reflect(index: Tensor, length: int) -> Tensor:
    period = max(2 * (length - 1), 1)
    folded = index.remainder(period)
    return torch.minimum(folded, period - folded) if length > 1 else folded


_SOURCES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "reflect": _reflect,
    "edge": lambda index, length: index.clamp(0, length - 1),
    "wrap": lambda index, length: index.remainder(length),
}


def _trilu(x: Tensor, k: int = 0, *, upper: int = 1) -> Tensor:
    return torch.triu(x, k) if upper else torch.tril(x, k)


def _eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    eye = torch.ones(x.shape, device=x.device).triu(k).tril(k)
    return eye.to(x.dtype if dtype is None else torch_dtype(dtype))


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, end, step = (t.item() for t in (start, limit, delta))
    return torch.arange(first, end, step, dtype=start.dtype, device=start.device)


def _constant_of_shape(shape: list[int], *, value: Any = None) -> Tensor:
    filler = torch.zeros(1) if value is None else tensor_from_numpy(value.values)
    return filler.reshape(()).expand(shape).clone()


def _depth_to_space(x: Tensor, *, blocksize: int, mode: Literal["CRD", "DCR"] = "DCR") -> Tensor:
    n, c, h, w = x.shape
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    x = x.reshape(n, blocksize, blocksize, c // blocksize**2, h, w)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * blocksize, w * blocksize)


def _space_to_depth(x: Tensor, *, blocksize: int, mode: Literal["CRD", "DCR"] = "DCR") -> Tensor:
    n, c, h, w = x.shape
    if mode == "CRD":
        return F.pixel_unshuffle(x, blocksize)
    x = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // blocksize, w // blocksize)


OPS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
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
