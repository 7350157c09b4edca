"""What the passes for nonlinear functions share: their modes, and the step onto the result's grid.

A kernel of `onnx_intq.kernels` gives integers with a scale of its own; they are requantised once.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from onnx_intq.grid import MULTIPLIER_BITS, Dyadic, dyadic, requantize
from onnx_intq.kernels.exponential import Mode
from onnx_intq.lowering import CannotLowerError, Operand, Site
from onnx_intq.requantization import WRAP, Step, division, emit, emit_shift
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import PassError

Float64 = npt.NDArray[np.float64]

ROOM = 61
"""Bits of a product and of an offset: their sum fits int64."""
FARTHEST = 2.0**44
"""Steps of the result that a bias may have, so that 17 fractional bits are left."""


def mode_named(name: str) -> Mode:
    """The mode of a pass's option.

    Raises:
        PassError: There is no such mode.
    """
    for mode in get_args(Mode):
        if mode == name:
            known: Mode = mode
            return known
    raise PassError(f"mode {name!r}; expected one of: {', '.join(get_args(Mode))}")


def for_rows(mode: Mode, x: Operand) -> Mode:
    """The mode for sums of exponentials: tables have 256 entries, so 16 bits take polynomials."""
    return "poly" if mode == "lut" and x.grid.bits > 8 else mode


def requantized(site: Site, builder: Builder, values: Any, scale: float) -> Value:
    """A kernel's result on the result's grid, cut to its limits, rounded half up.

    Equal to `grid.requantize`: an int32 division takes its place only where that is proven to be
    the same function.

    Args:
        site: Gives the grid and the limits.
        builder: Takes the nodes.
        values: A `Value`, |values| < 2^33: the multiplier has as many bits as they leave of 62.
        scale: Real units per step of `values`.

    Raises:
        IntqError: The scales are too far apart.
    """
    result = site.result
    bits = multiplier_bits(values)
    step = Step(
        multiplier=dyadic([scale / result.scale], 62 - result.grid.bits, bits),
        bias=np.zeros(1, np.int64),
        low=np.array([values.low]),
        high=np.array([values.high]),
        zero_point=result.zero_point,
        first=site.first,
        last=site.last,
    )
    base = step.first + (WRAP if result.grid.signed else 0)
    if result.grid.bits == 8 and bits == MULTIPLIER_BITS and division(step, base) is not None:
        return emit(values, step, result.grid, ())
    if (shifted := emit_shift(values, step, result.grid, ())) is not None:
        return shifted
    limits = {"zero_point": result.zero_point, "low": site.first, "high": site.last}
    multiplier = Dyadic(step.multiplier.b.reshape(()), step.multiplier.c.reshape(()))
    integers = requantize(values, multiplier, **limits)
    return builder.value(integers.astype(result.grid.dtype), site.first, site.last)


def multiplier_bits(values: Value) -> int:
    """How many bits a multiplier of `values` may have, so that the product stays below 2^62."""
    return min(MULTIPLIER_BITS, 62 - max(-values.low, values.high).bit_length())


def onto_channels(
    y: Any, factor: Float64, shift: Float64, *, zero_point: int, low: int, high: int
) -> Any:
    """clip(floor(y * factor + shift + 1/2) + zero_point, low, high), rounded once.

    Both are held with c fractional bits, the same for both in a channel, as many as leave |y| * b
    and |offset| below 2^61; so the factor has up to 31 significant bits.

    Args:
        y: int64 [..., channels], |y| <= 2^30, or a `trace.Value`.
        factor: float64 [channels] or [1].
        shift: float64 [channels] or scalar, in steps of the result.
        zero_point: Of the result.
        low: The lowest result.
        high: The highest.

    Returns:
        Integers of the shape of `y`.

    Raises:
        IntqError: A factor of 2^30 or more, or a shift of 2^44 or more.
    """
    reach = np.abs(shift) + abs(zero_point - low) + 1
    if reach.max() >= FARTHEST:
        raise CannotLowerError("its bias lies far outside the range of its result")
    c = np.minimum(dyadic(np.abs(factor)).c, ROOM - np.frexp(reach)[1]).astype(np.int64)
    b = np.rint(np.ldexp(factor, c)).astype(np.int64)
    offset = np.rint(np.ldexp(shift + 0.5, c)).astype(np.int64) + ((zero_point - low) << c)
    return np.minimum(np.maximum(y * b + offset, 0) >> c, high - low) + low
