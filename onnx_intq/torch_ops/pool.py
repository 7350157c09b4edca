"""Pooling: sliding windows and whole feature maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnx_intq.torch_ops.windows import Windows

_MAX: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _kernel_axes(x: Tensor) -> tuple[int, ...]:
    """The kernel's axes of `Windows.unfold(x)`: as many, at the end, as `x` has spatial axes."""
    return tuple(range(2 - x.ndim, 0))


def _max_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,
    outputs: int,
) -> Tensor | tuple[Tensor, Tensor]:
    view = Windows.over(x.shape[2:], kernel_shape, strides, pads, dilations, auto_pad, ceil_mode)
    if outputs > 1:
        return _max_and_index(x, view, storage_order)
    if x.is_floating_point():
        padded = view.pad(x, -torch.inf)
        return _MAX[x.ndim - 2](padded, view.kernel, view.strides, 0, view.dilations)
    return view.unfold(view.pad(x, torch.iinfo(x.dtype).min)).amax(_kernel_axes(x))


def _max_and_index(x: Tensor, view: Windows, storage_order: int) -> tuple[Tensor, Tensor]:
    """Maxima, and the place of each in `x` laid out flat, columns first if storage_order is 1."""
    places = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    if storage_order:
        places = places.reshape(x.shape[:-2] + x.shape[:-3:-1]).transpose(-1, -2)
    lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    best = view.unfold(view.pad(x, lowest)).flatten(x.ndim).max(-1, keepdim=True)
    index = view.unfold(view.pad(places)).flatten(x.ndim).gather(-1, best.indices)
    return best.values.squeeze(-1), index.squeeze(-1)


def _average_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Tensor:
    given = Windows.over(x.shape[2:], kernel_shape, strides, pads, dilations, auto_pad)
    view = Windows.over(x.shape[2:], kernel_shape, strides, pads, dilations, auto_pad, ceil_mode)
    counted = torch.ones_like(x[:1, :1])
    if count_include_pad:  # the padding asked for counts, what ceil_mode adds does not
        excess = tuple(v - g for v, g in zip(view.ends, given.ends, strict=True))
        counted = replace(view, begins=(0,) * len(excess), ends=excess).pad(given.pad(counted, 1.0))
    else:
        counted = view.pad(counted)
    return _mean(view.pad(x), view) / _mean(counted, view)


def _mean(padded: Tensor, view: Windows) -> Tensor:
    if max(view.dilations) == 1:
        return _MEAN[padded.ndim - 2](padded, view.kernel, view.strides)
    return view.unfold(padded).mean(_kernel_axes(padded))


def _lp_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    p: float = 2,
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
) -> Tensor:
    view = Windows.over(x.shape[2:], kernel_shape, strides, pads, dilations, auto_pad, ceil_mode)
    norms: Tensor = torch.linalg.vector_norm(view.unfold(view.pad(x)), p, _kernel_axes(x))
    return norms


def _global_average_pool(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def _global_max_pool(x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


def _global_lp_pool(x: Tensor, *, p: float = 2) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, p, tuple(range(2, x.ndim)), keepdim=True)
    return norms


OPS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "GlobalLpPool": _global_lp_pool,
    "GlobalMaxPool": _global_max_pool,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
}
