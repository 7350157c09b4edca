"""Operators over whole axes: reductions, arg-extrema, softmax, cumulative sums, top-k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class _Reduction(Protocol):
    def __call__(self, x: Tensor, axes: tuple[int, ...], keep: bool, /) -> Tensor: ...


def _reduce(function: _Reduction) -> Callable[..., Tensor]:
    """`function` with ONNX's axes: an attribute or an input, absent or empty for all of them."""

    def run(
        x: Tensor,
        axes: list[int] | None = None,
        *,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        if not axes and not noop_with_empty_axes:
            axes = list(range(x.ndim))
        return function(x, tuple(axes or ()), bool(keepdims)) if axes or x.ndim == 0 else x

    return run


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x, axes, keep, dtype=x.dtype)


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keep)
    return torch.mean(x.double(), axes, keep).to(x.dtype)


def _extremum(sign: int) -> _Reduction:
    def run(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if x.dtype == torch.bool:
            return run(x.to(torch.uint8), axes, keep).bool()
        if x.numel() == 0:  # the neutral element, as the specification has it
            bounds = torch.finfo if x.is_floating_point() else torch.iinfo
            worst = -torch.inf if x.is_floating_point() else bounds(x.dtype).min
            best = torch.inf if x.is_floating_point() else bounds(x.dtype).max
            shape = torch.sum(x, axes, keep).shape
            return torch.full(shape, worst if sign > 0 else best, dtype=x.dtype, device=x.device)
        return torch.amax(x, axes, keep) if sign > 0 else torch.amin(x, axes, keep)

    return run


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _norm_1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _norm_2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    real = x if x.is_floating_point() else x.double()
    norm: Tensor = torch.linalg.vector_norm(real, dim=axes, keepdim=keep)
    return norm.to(x.dtype)


def _arg_extremum(sign: int) -> Callable[..., Tensor]:
    def run(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        pick = torch.argmax if sign > 0 else torch.argmin
        if not select_last_index:
            return pick(x, axis, bool(keepdims))
        from_end = pick(x.flip(axis), axis, bool(keepdims))
        return torch.sub(torch.tensor(x.shape[axis] - 1), from_end)

    return run


def _from_axis(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """`function` along `axis`; below opset 13 over all axes from `axis` (default 1) on, as one."""

    def run(x: Tensor, *, axis: int | None = None, opset: int) -> Tensor:
        if opset >= 13:
            return function(x, -1 if axis is None else axis)
        start = (1 if axis is None else axis) % x.ndim
        return function(x.flatten(start), start).reshape(x.shape) if start < x.ndim else x

    return run


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


def _cumulative(function: Callable[[Tensor, int], Tensor], neutral: int) -> Callable[..., Tensor]:
    def run(x: Tensor, axis: int, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
        if reverse:
            x = x.flip(axis)
        if exclusive:
            first = torch.full_like(x.narrow(axis, 0, 1), neutral)
            x = torch.cat([first, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
        y = function(x, axis).to(x.dtype)
        return y.flip(axis) if reverse else y

    return run


def _top_k(
    x: Tensor,
    k: int,
    *,
    axis: int = -1,
    largest: int = 1,
    sorted_: int = 1,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    # A stable sort gives equal elements by rising index, which torch.topk does not promise.
    order = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return order.values.narrow(axis, 0, k), order.indices.narrow(axis, 0, k)


OPS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "ArgMax": _arg_extremum(+1),
    "ArgMin": _arg_extremum(-1),
    "CumProd": _cumulative(torch.cumprod, 1),
    "CumSum": _cumulative(torch.cumsum, 0),
    "Hardmax": _from_axis(_hardmax),
    "LogSoftmax": _from_axis(torch.log_softmax),
    "ReduceL1": _reduce(_norm_1),
    "ReduceL2": _reduce(_norm_2),
    "ReduceLogSum": _reduce(lambda x, axes, keep: torch.log(_sum(x, axes, keep))),
    "ReduceLogSumExp": _reduce(lambda x, axes, keep: torch.logsumexp(x, axes, keep)),
    "ReduceMax": _reduce(_extremum(+1)),
    "ReduceMean": _reduce(_mean),
    "ReduceMin": _reduce(_extremum(-1)),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(_sum),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: _sum(x * x, axes, keep)),
    "Softmax": _from_axis(torch.softmax),
    "TopK": _top_k,
}
