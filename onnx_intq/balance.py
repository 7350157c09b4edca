"""Rounds weights without data so that errors cancel within every kernel and every output channel.

SQuant (arXiv 2202.07471, 3.2-3.4): with inputs that vary slowly, the squared error of an output is
the sum of three: of the weights' squared errors, of the kernels' squared sums of errors, and of the
output channel's. Rounding to nearest makes the first least; flipping the errors closest to a half
brings the sums down and adds little to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.floating[Any]]


def balance_rows(target: Float, start: Float, top: int) -> Float:
    """Integers next to `target` whose errors cancel; each differs from `start` by at most one.

    Args:
        target: Weights in steps of their grid, [outputs, kernels, taps].
        start: The nearest integers on the grid, the same shape.
        top: The grid is -top .. top; weights outside have errors that cannot be flipped.

    Returns:
        The type and shape of `start`. Where no weight is outside the grid, every sum of an output
        channel's errors is at most half a step, and that of a kernel's at most one; at most half
        where the output channel has one kernel only.
    """
    error = start - target
    excess = np.rint(error.sum(axis=-1))
    flip = _most_wrong(error, excess, _movable(error, start, excess[..., None], top))
    found, error = start - flip, error - flip
    sums = error.sum(axis=-1)
    excess = np.rint(sums.sum(axis=-1))
    movable = _movable(error, found, excess[:, None, None], top)
    kernels = _most_wrong(sums, excess, movable.any(axis=-1))
    worst = np.where(movable, np.abs(error), -1.0).argmax(axis=-1)
    return np.asarray(found - kernels[..., None] * (worst[..., None] == np.arange(error.shape[-1])))


def _movable(error: Float, rounded: Float, excess: Float, top: int) -> npt.NDArray[np.bool_]:
    """Which weights are off in the direction of `excess` and may be moved against it."""
    return (error * excess > 0) & (np.abs(rounded - np.sign(error)) <= top)


def _most_wrong(error: Float, excess: Float, allowed: npt.ArrayLike) -> Float:
    """The sign of `excess` at as many places of the last axis, those of the largest errors; else 0.

    Args:
        error: [..., places].
        excess: Integers, [...].
        allowed: Where it may be, like `error`.
    """
    sign = np.sign(excess)[..., None]
    order = np.argsort(np.where(allowed, -error * sign, np.inf), axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    return np.where(np.logical_and(allowed, rank < np.abs(excess)[..., None]), sign, 0.0)
