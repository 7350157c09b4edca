"""The error function and GELU in integers.

I-BERT (Kim et al., arXiv:2101.01321, section 3.4) takes erf for a clipped parabola with rounded
constants: mode "paper". Mode "poly" takes what is left of a limit, for u = |x|, as

    erf(x)  = sgn(x) (1 - h(u)),     h = min(1, t^4 (a - b t^2)),   t = max(0, 1 - u / reach)
    GELU(x) = max(x, 0) - u g(u),    g = a t^4

so that both are exact beyond their reach, where I-BERT's parabola is, too. t^2 is a second-order
polynomial clipped on one side; so is a - b t^2 of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_intq.grid import dyadic
from onnx_intq.kernels.exponential import Mode
from onnx_intq.trace import take
from onnx_intq.transform import IntqError

ONE = 1 << 15
"""t, h and g are in steps of 2^-15."""


@dataclass(frozen=True, kw_only=True)
class Remainder:
    """min(1, t^4 (a - b t^2)), t = max(0, 1 - u / reach)."""

    reach: float
    a: float
    b: float = 0.0


ERF = Remainder(reach=2.41629, a=1.55626, b=0.55136)
"""Least largest error of erf, 4.59e-3: minimised over u = 0, 1e-4 .. 6 by Nelder and Mead's method.

It alternates between extremes near u = 0, 0.26, 0.87 and 1.71, as the best approximation with three
coefficients must. I-BERT's constants have 9.6e-2; the best clipped parabola, 0.3356 (1.7092 - u)^2,
has 2.0e-2.
"""

GELU = Remainder(reach=3.69652, a=0.549328)
"""Least largest error of GELU, 3.84e-3: found likewise, with extremes at u = 0.17, 0.82 and 1.78.

I-BERT's has 1.8e-2; the best u a t^2, with reach 2.5889, has 1.45e-2.
"""

PUBLISHED_A, PUBLISHED_B = -0.2888, -1.769
"""I-BERT: erf(x) = sgn(x) (a (min(u, -b) + b)^2 + 1)."""


def erf(q: Any, scale: float, mode: Mode = "poly") -> tuple[Any, float]:
    """The error function of q * scale; odd.

    Errors, largest: "poly" 4.8e-3 at any width; "lut" 2^-16; "paper" 9.7e-2 for steps up to 0.3,
    0.17 for steps up to 1.

    Args:
        q: int64, any shape, |q| <= 65535 (255 for "lut"); or a `trace.Value`.
        scale: Real units per step.
        mode: See `onnx_intq.kernels`.

    Returns:
        Integers of the shape of `q`, |result| <= 2^15, and their scale.

    Raises:
        IntqError: Mode "paper" and a scale above 1.
    """
    if mode == "lut":
        return _tabled(q, scale, math.erf, 1.0 / ONE), 1.0 / ONE
    if mode == "paper":
        polynomial, step, _ = _published(np.abs(q), scale)
        return np.sign(q) * polynomial, step
    return np.sign(q) * (ONE - _remainder(np.abs(q), scale, ERF)), 1.0 / ONE


def gelu(q: Any, scale: float, mode: Mode = "poly") -> tuple[Any, float]:
    """The Gaussian error linear unit x (1 + erf(x / sqrt(2))) / 2 of x = q * scale.

    Errors, largest: "poly" 4.1e-3 at any width; "lut" half a step of the result; "paper" 1.9e-2
    for |x| up to 8 and steps up to 0.08, more with either.

    Bounds: |q| <= 65535 < 2^16 and the factors <= 2^15, so the results are below 2^31.

    Args:
        q: int64, any shape, |q| <= 65535 (255 for "lut"); or a `trace.Value`.
        scale: Real units per step.
        mode: See `onnx_intq.kernels`.

    Returns:
        Integers of the shape of `q`, and their scale, `scale` / 2^15 but in mode "paper".

    Raises:
        IntqError: Mode "paper" and a scale above sqrt(2).
    """
    if mode == "lut":
        return _tabled(q, scale, _gelu, scale / ONE), scale / ONE
    if mode == "paper":
        polynomial, step, one = _published(np.abs(q), scale / math.sqrt(2))
        return q * (np.sign(q) * polynomial + one), scale * step / 2
    u = np.abs(q)
    return np.maximum(q, 0) * ONE - u * _remainder(u, scale, GELU), scale / ONE


def _remainder(u: Any, scale: float, shape: Remainder) -> Any:
    """`shape` at u * scale, in steps of 2^-15: 0..2^15.

    Bounds: u < 2^16 and the multiplier's b < 2^31, c <= 54. t <= 2^15, so t^2, t^4 and the last
    product, whose factors are t^4 and at most a 2^15 < 2^16, are below 2^31: int32.
    The multiplier is kept in 2^-20 .. 2^15, where every u >= 1 is out of reach: so c is 15..51, and
    the shifted product is below 2^31.
    Each floor loses up to a step, three steps or 9.2e-5 in all; u's rounding less than 6e-5.
    """
    multiplier = dyadic(min(max(ONE * scale / shape.reach, 2.0**-20), 2.0**15))
    b, c = int(multiplier.b), int(multiplier.c)
    t = ONE - np.minimum((u * b + (1 << (c - 1))) >> c, ONE)
    square = (t * t) >> 15
    fourth = (square * square) >> 15
    factor: Any = round(shape.a * ONE)
    if shape.b:
        factor = factor - ((square * round(shape.b * ONE)) >> 15)
    return np.minimum((fourth * factor) >> 15, ONE)


def _published(u: Any, scale: float) -> tuple[Any, float, int]:
    """I-BERT's i-erf of u >= 0, both signs turned so that the step is positive; its step; its one.

    The published code drops 14 bits; here as many as leave 1 at most 2^14, to fit any scale.
    Bounds: a scale below 2^-24 is taken for one above by dropping bits of u, so
    -b <= 1.769 * 2^24 + 1 and -c <= 2^48 / 0.2888 + 1 < 2^50.
    """
    if scale > 1:
        raise IntqError(
            f"an erf of steps of {scale:.3g}; expected at most 1 in mode paper; "
            "use mode poly, or 16 bits for its input"
        )
    coarser = max(0, -24 - math.floor(math.log2(scale)))
    if coarser:
        u, scale = u >> min(coarser, 62), math.ldexp(scale, coarser)
    b = math.floor(PUBLISHED_B / scale)
    c = math.floor(1 / (PUBLISHED_A * scale**2))
    parabola = np.minimum(u, -b) + b
    step = -PUBLISHED_A * scale**2
    drop = max(0, (-c).bit_length() - 14)
    return (-c - parabola * parabola) >> drop, math.ldexp(step, drop), -c >> drop


def _tabled(q: Any, scale: float, function: Any, step: float) -> Any:
    values = [function(i * scale) / step for i in range(-255, 256)]
    return take(np.rint(values).astype(np.int64), q + 255)


def _gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
