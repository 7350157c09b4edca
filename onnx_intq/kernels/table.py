"""Tables: any function of one integer grid on another, exactly rounded. Mode "lut" for 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_intq.trace import take
from onnx_intq.transform import IntqError

Function = Callable[[npt.NDArray[np.float64]], npt.ArrayLike]


def table(
    function: Function,
    in_scale: float,
    in_zero_point: int,
    in_low: int,
    in_high: int,
    out_scale: float,
    out_zero_point: int,
    out_low: int,
    out_high: int,
) -> npt.NDArray[np.int64]:
    """`function` at every integer of a grid: round half to even as QuantizeLinear, saturated.

    It is computed in float64. Infinite values saturate.

    Args:
        function: Elementwise, float64 in and out, real units.
        in_scale: Real units per step of the input.
        in_zero_point: Its zero point.
        in_low: The lowest integer of the input.
        in_high: The highest.
        out_scale: As `in_scale`, of the output; and so on.
        out_zero_point: Of the output.
        out_low: Of the output.
        out_high: Of the output.

    Returns:
        int64 [in_high - in_low + 1]; entry i belongs to the input in_low + i.

    Raises:
        IntqError: The function has no value at a point of the grid.
    """
    q = np.arange(in_low, in_high + 1)
    x = (q - in_zero_point) * np.float64(in_scale)
    with np.errstate(all="ignore"):
        y = np.asarray(function(x), np.float64)
        steps = np.rint(y / out_scale)
    if np.isnan(steps).any():
        first = int(np.flatnonzero(np.isnan(steps))[0])
        raise IntqError(
            f"a table whose function is not a number at {x[first]:g} (integer {q[first]}); "
            f"expected a value at every integer of the grid {in_low}..{in_high}; "
            "calibrate with data that stay in the function's domain, or keep the node float"
        )
    entries = np.clip(steps + out_zero_point, out_low, out_high)
    return np.asarray(entries, np.int64)


def lookup(q: Any, entries: npt.NDArray[np.int64], in_low: int) -> Any:
    """The entries of a `table` for `q`.

    Args:
        q: Integers of the grid, in_low .. in_low + len(entries) - 1, any shape; with their zero
            point. Or a `trace.Value` with these bounds.
        entries: int64 [in_high - in_low + 1].
        in_low: The lowest integer of the grid.

    Returns:
        Integers of the shape of `q`.
    """
    return take(entries, q - in_low)
