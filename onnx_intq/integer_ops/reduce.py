"""Operators over whole axes: reductions, arg-extrema, cumulative sums, top-k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from onnx_intq.integer_ops.arrays import EXACT, Array, Function, fitting, integer_range, is_integer


class _Reduction(Protocol):
    def __call__(self, x: Array, axes: tuple[int, ...], keep: bool, /) -> Array: ...


def _reduce(function: _Reduction) -> Callable[..., Array]:
    """`function` with ONNX's axes: an attribute or an input, absent or empty for all of them."""

    def run(
        x: Array,
        axes: list[int] | None = None,
        *,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Array:
        if not axes and not noop_with_empty_axes:
            axes = list(range(x.ndim))
        return function(x, tuple(axes or ()), bool(keepdims))

    return run


def _total(term: Callable[[Array], Array]) -> _Reduction:
    """The sum of `term` of integers, refused where onnxruntime's need not be exact."""

    def run(x: Array, axes: tuple[int, ...], keep: bool) -> Array:
        _check_exact(np.sum(np.abs(term(x.astype(np.float64))), axes))
        return fitting(np.sum(term(x.astype(np.int64)), axes, keepdims=keep), x.dtype)

    return run


def _check_exact(magnitudes: Array) -> None:
    """Refuse what onnxruntime, which adds and multiplies up in float64, may round.

    The magnitude is added up in float64 too: below 2^53 that is exact, and never falls below again.
    """
    if not (magnitudes < EXACT).all():
        raise OverflowError(
            "a sum or product of magnitude 2^53 or more, which onnxruntime rounds to float64"
        )


def _mean(x: Array, axes: tuple[int, ...], keep: bool) -> Array:
    """The mean, rounded towards zero."""
    _check_exact(np.sum(np.abs(x.astype(np.float64)), axes))
    total = np.sum(x.astype(np.int64), axes, keepdims=keep)
    count = x.size // max(total.size, 1)
    return fitting(np.sign(total) * (np.abs(total) // max(count, 1)), x.dtype)


def _extremum(sign: int) -> _Reduction:
    def run(x: Array, axes: tuple[int, ...], keep: bool) -> Array:
        function = np.max if sign > 0 else np.min
        if x.size:
            return np.asarray(function(x, axes, keepdims=keep))
        return np.asarray(function(x, axes, keepdims=keep, initial=_neutral(x, sign)))

    return run


def _neutral(x: Array, sign: int) -> int | float | bool:
    """What the extremum of nothing is, as the specification has it."""
    if x.dtype == np.bool_:
        return sign < 0
    if is_integer(x.dtype):
        return integer_range(x.dtype)[0 if sign > 0 else 1]
    return -sign * np.inf


def _product(x: Array, axes: tuple[int, ...], keep: bool) -> Array:
    _check_exact(np.prod(np.maximum(np.abs(x.astype(np.float64)), 1), axes))
    return fitting(np.prod(x.astype(np.int64), axes, keepdims=keep), x.dtype)


def _arg_extremum(sign: int) -> Callable[..., Array]:
    def run(x: Array, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Array:
        pick = np.argmax if sign > 0 else np.argmin
        if not select_last_index:
            return np.asarray(pick(x, axis, keepdims=bool(keepdims)))
        from_end = pick(np.flip(x, axis), axis, keepdims=bool(keepdims))
        return np.asarray(x.shape[axis] - 1 - from_end)

    return run


def _cumulative(function: Callable[..., Array], neutral: int) -> Callable[..., Array]:
    def run(x: Array, axis: int, *, exclusive: int = 0, reverse: int = 0) -> Array:
        if reverse:
            x = np.flip(x, axis)
        if exclusive:
            start = np.full_like(np.take(x, [0], axis), neutral)
            x = np.concatenate([start, np.take(x, range(x.shape[axis] - 1), axis)], axis)
        y = function(x, axis, dtype=x.dtype)
        return np.flip(y, axis) if reverse else y

    return run


def _top_k(
    x: Array,
    k: int,
    *,
    axis: int = -1,
    largest: int = 1,
    sorted_: int = 1,  # noqa: ARG001
) -> tuple[Array, Array]:
    """The k extreme values and where they are, in order; equal ones by rising index."""
    order = np.argsort(np.flip(x, axis) if largest else x, axis, stable=True)
    if largest:  # turned round twice, so that equal ones keep their order
        order = x.shape[axis] - 1 - np.flip(order, axis)
    order = np.take(order, range(k), axis)
    return np.take_along_axis(x, order, axis), order


OPS: dict[str, Function] = {
    "ArgMax": _arg_extremum(+1),
    "ArgMin": _arg_extremum(-1),
    "CumProd": _cumulative(np.cumprod, 1),
    "CumSum": _cumulative(np.cumsum, 0),
    "ReduceL1": _reduce(_total(np.abs)),
    "ReduceMax": _reduce(_extremum(+1)),
    "ReduceMean": _reduce(_mean),
    "ReduceMin": _reduce(_extremum(-1)),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(_total(np.positive)),
    "ReduceSumSquare": _reduce(_total(np.square)),
    "TopK": _top_k,
}
