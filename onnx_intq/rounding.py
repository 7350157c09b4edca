"""Rounds weights up or down so that a layer's outputs, not its weights, change the least.

For rows w of a weight and inputs x, the error of the rounded row q is (q - w) H (q - w)', where
H = E[x x'] is the second moment of the inputs: no pass over data is needed to try a rounding.
`round_rows` takes column after column and lets later ones make up for what earlier ones lose
(OBQ and GPTQ, arXiv 2210.17323, 2.2), then moves single weights as long as the error falls. Both
take the level of a codebook that is nearest where they take the nearest integer on a grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_intq.lloyd import nearest

Float32 = npt.NDArray[np.float32]
Round = Callable[[Float32, npt.NDArray[Any]], Float32]
"""Values to the nearest integers allowed, within bounds [2, ...]."""

BLOCK = 64
"""Columns between two updates of all later ones: one matrix product in place of many."""
SWEEPS = 2
"""Rounds of single moves; more gain less than 2 % of the error."""


def round_rows(
    target: Float32,
    start: Float32,
    moment: Float32,
    bounds: npt.NDArray[Any],
    levels: Float32 | None = None,
) -> Float32:
    """Integers near `target` whose error under `moment` is small, none above that of `start`.

    Args:
        target: Rows in steps of their grid, [groups, outputs, taps].
        start: Integers to compare with, the same shape.
        moment: Of the inputs, positive definite, [groups, taps, taps].
        bounds: The lowest and the highest integers allowed, [2, groups, outputs, taps]; `start`
            lies within.
        levels: The integers allowed, ascending, of which the bounds are some; None for all.

    Returns:
        float32 integers, the shape of `target`.
    """
    rounded = _to_integer if levels is None else _to_level(levels)
    found = _in_order(target, moment, bounds, rounded)
    for _ in range(SWEEPS):
        found = _by_single_moves(target, found, moment, bounds, rounded)
    better = squared_errors(found - target, moment) < squared_errors(start - target, moment)
    return np.where(better[..., None], found, start)


def squared_errors(difference: Float32, moment: Float32) -> npt.NDArray[np.float64]:
    """E[(d x)^2] for rows d [groups, outputs, taps] and E[x x'] = moment: [groups, outputs]."""
    return np.asarray((difference @ moment * difference).sum(axis=-1), np.float64)


def _in_order(
    target: Float32, moment: Float32, bounds: npt.NDArray[Any], rounded: Round
) -> Float32:
    """Round column after column; what is lost is spread over the columns still to come."""
    spread = _spread(moment)
    left, found, taps = target.copy(), np.empty_like(target), target.shape[-1]
    for start in range(0, taps, BLOCK):
        end = min(start + BLOCK, taps)
        lost = np.empty((*target.shape[:2], end - start), np.float32)
        for k in range(start, end):
            found[..., k] = rounded(left[..., k], bounds[..., k])
            lost[..., k - start] = left[..., k] - found[..., k]
            left[..., k:end] -= lost[..., k - start, None] * spread[:, k, None, k:end]
        left[..., end:] -= lost @ spread[:, start:end, end:]
    return found


def _by_single_moves(
    target: Float32,
    start: Float32,
    moment: Float32,
    bounds: npt.NDArray[Any],
    rounded: Round,
) -> Float32:
    """Move every weight to the integer that is best while the others stay: the error only falls."""
    found, taps = start.copy(), target.shape[-1]
    difference = found - target
    own = np.einsum("gkk->gk", moment)[:, None]
    for first in range(0, taps, BLOCK):
        block = slice(first, min(first + BLOCK, taps))
        slope, inner = difference @ moment[..., block], moment[:, block, block]
        before = found[..., block].copy()
        for number, k in enumerate(range(first, block.stop)):
            best = rounded(found[..., k] - slope[..., number] / own[..., k], bounds[..., k])
            moved = best - found[..., k]
            found[..., k] = best
            slope[..., number:] += moved[..., None] * inner[:, number, None, number:]
        difference[..., block] += found[..., block] - before
    return found


def _spread(moment: Float32) -> Float32:
    """By how much later columns move for a unit lost in an earlier one, in the rows; diagonal 1.

    With the inverse of the moment as U'U, U upper triangular: the rows of U by their diagonal.
    """
    reverse = moment[:, ::-1, ::-1].astype(np.float64)
    upper = np.linalg.inv(np.linalg.cholesky(reverse)[:, ::-1, ::-1])
    return np.asarray(upper / np.einsum("gkk->gk", upper)[..., None], np.float32)


def _to_integer(values: Float32, bounds: npt.NDArray[Any]) -> Float32:
    found: Float32 = np.clip(np.rint(values), bounds[0], bounds[1])
    return found


def _to_level(levels: Float32) -> Round:
    def rounded(values: Float32, bounds: npt.NDArray[Any]) -> Float32:
        found: Float32 = levels[nearest(levels, np.clip(values, bounds[0], bounds[1]))]
        return found

    return rounded
