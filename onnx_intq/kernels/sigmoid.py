"""Sigmoid and what is made of it, with one integer division each.

e = exp(-|x|) gives sigmoid(-|x|) = e / (1 + e), and sigmoid(|x|) is 1 minus that: the symmetry is
exact. All constants are those of `onnx_intq.kernels.exponential`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_intq.kernels.exponential import Mode, decay
from onnx_intq.trace import bounded


def sigmoid(q: Any, scale: float, mode: Mode = "poly", bits: int = 16) -> tuple[Any, float]:
    """The logistic function 1 / (1 + exp(-q * scale)).

    Law: sigmoid(q) + sigmoid(-q) = 2^bits, and sigmoid(0) = 2^(bits-1) but in mode "paper".
    It never falls as q grows, but by one step of the result where `scale` is below 2^-13: e then
    grows less from one q to the next than the rounding of the divisor takes away.
    Errors, largest: "poly" 6e-4 at any width; "lut" 2^-16 with 16 bits.

    Bounds: 0 <= e <= one <= 2^30 - 2^16, so e + one + half < 2^31: int32. In mode "paper", where e
    at 0 is 0.34 to 1.0003, one < 2^32: int64. The divisor is at least one >> bits >= 2^13: never 0;
    rounded, it is off by 2^(bits-30) of itself at most.

    Args:
        q: int64, any shape, |q| <= 65535; or a `trace.Value`. Mode "lut": |q| <= 255.
        scale: Real units per step.
        mode: See `onnx_intq.kernels`.
        bits: The result has scale 2^-bits, 1 <= bits <= 16.

    Returns:
        Integers of the shape of `q`, 0..2^bits, and their scale.

    Raises:
        IntqError: Mode "paper" and a scale above ln 2.
    """
    e, step = decay(np.abs(q), scale, mode)
    divisor = (e + (round(1 / step) + (1 << (bits - 1)))) >> bits
    # e is 1.0003 * one at most ("paper"), so the quotient is about 1/2 at most.
    lower = bounded((e + (divisor >> 1)) // divisor, 0, 1 << bits)
    return np.where(q >= 0, (1 << bits) - lower, lower), 2.0**-bits


def tanh(q: Any, scale: float, mode: Mode = "poly") -> tuple[Any, float]:
    """The hyperbolic tangent of q * scale, 2 sigmoid(2 x) - 1: odd, 0 at 0, but in mode "paper".

    Errors, largest: twice those of `sigmoid`. Arguments and errors raised are those of `sigmoid`,
    with the limit of mode "paper" at half the scale.

    Returns:
        Integers of the shape of `q`, -2^15..2^15, and their scale, 2^-15.
    """
    doubled, step = sigmoid(q, 2 * scale, mode)
    return doubled - (1 << 15), 2 * step


def swish(q: Any, scale: float, mode: Mode = "poly") -> tuple[Any, float]:
    """Swish, also called SiLU: x * sigmoid(x), x = q * scale. Arguments as for `sigmoid`.

    Returns:
        Integers of the shape of `q` and their scale; |result| <= 65535 * 2^15 < 2^31.
    """
    return glu(q, scale, q, scale, mode)


def glu(a: Any, a_scale: float, b: Any, b_scale: float, mode: Mode = "poly") -> tuple[Any, float]:
    """The gated linear unit of two halves: a * sigmoid(b).

    Args:
        a: int64, |a| <= 65535, or a `trace.Value`.
        a_scale: Real units per step of `a`.
        b: As `q` of `sigmoid`; a shape that broadcasts with that of `a`.
        b_scale: Real units per step of `b`.
        mode: See `onnx_intq.kernels`.

    Returns:
        Integers and their scale; |result| <= 65535 * 2^15 < 2^31.

    Raises:
        IntqError: As `sigmoid`.
    """
    gate, step = sigmoid(b, b_scale, mode, bits=15)
    return a * gate, a_scale * step
