"""Operators that map each element of integers; a result that does not fit wraps in its type.

Where onnxruntime leaves the result undefined (division by zero, the lowest integer divided by -1, a
power that does not fit), there is no result here either, but an error. Everything here is exact;
onnxruntime computes Mod with fmod, and Pow, in float64: the same as long as that holds the numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from onnx_intq.integer_ops.arrays import Array, Function, integer_range, is_integer


def unary(function: Callable[[Array], Array]) -> Function:
    """`function` as an operator of one input; NumPy's own take more, such as `out`."""

    def run(x: Array) -> Array:
        return function(x)

    return run


def binary(function: Callable[[Array, Array], Array]) -> Function:
    """`function` as an operator of two inputs."""

    def run(a: Array, b: Array) -> Array:
        return function(a, b)

    return run


def _variadic(function: Callable[[Array, Array], Array]) -> Function:
    def run(*arrays: Array) -> Array:
        return functools.reduce(function, arrays)

    return run


def _divide(a: Array, b: Array) -> Array:
    """The quotient, rounded towards zero."""
    if not is_integer(a.dtype):
        real: Array = np.true_divide(a, b)
        return real
    _check_division(a, b)
    if a.dtype.kind == "u":
        return np.floor_divide(a, b)
    # As unsigned numbers magnitudes always fit, that of the lowest integer too.
    unsigned = np.dtype(f"u{a.dtype.name}")
    magnitude = np.floor_divide(np.abs(a).view(unsigned), np.abs(b).view(unsigned)).view(a.dtype)
    quotient: Array = np.where((a < 0) != (b < 0), -magnitude, magnitude)
    return quotient


def _check_division(a: Array, b: Array) -> None:
    """Refuse what ends onnxruntime: a division by zero, and on x86 a quotient that does not fit.

    Below 32 bits that quotient wraps, the division being one of 32 bits.
    """
    low, _ = integer_range(a.dtype)
    if not b.all():
        raise ZeroDivisionError("integer division by zero")
    if low < 0 and a.dtype.itemsize >= 4 and ((b == -1) & (a == low)).any():
        raise OverflowError(f"{low} / -1 leaves {a.dtype.name}")


def _mod(a: Array, b: Array, *, fmod: int = 0) -> Array:
    """The remainder, with the sign of `a` where `fmod`, else with that of `b`."""
    _check_division(a, b)
    return np.fmod(a, b) if fmod else np.remainder(a, b)


def _power(x: Array, exponent: Array) -> Array:
    """`x` to integer powers, rounded towards zero."""
    if not (is_integer(x.dtype) and is_integer(exponent.dtype)):
        raise TypeError(f"{x.dtype.name} to {exponent.dtype.name} powers; expected integers")
    real = np.power(x.astype(np.float64), exponent.astype(np.float64))
    low, high = integer_range(x.dtype)
    # float64 tells what fits: from exponent 2 on a power is 2^63 itself, which float64 holds, or at
    # least 1e-10 of it away, far above rounding.
    if np.isinf(real).any() or not ((real >= low) & (real < float(high + 1))).all():
        raise OverflowError(f"a power leaves {x.dtype.name}")
    whole = np.power(x.astype(np.int64), np.maximum(exponent, 0).astype(np.int64))
    return np.where(exponent < 0, real.astype(np.int64), whole).astype(x.dtype)


def _clip(x: Array, min_: Array | None = None, max_: Array | None = None) -> Array:
    # In this order: where the bounds cross, ONNX wants the upper one.
    if min_ is not None:
        x = np.maximum(x, min_)
    return x if max_ is None else np.minimum(x, max_)


OPS: dict[str, Function] = {
    "Abs": unary(np.abs),
    "Add": binary(np.add),
    "Ceil": unary(np.ceil),
    "Clip": _clip,
    "Div": binary(_divide),
    "Floor": unary(np.floor),
    "Identity": unary(lambda x: x),
    "Max": _variadic(np.maximum),
    "Min": _variadic(np.minimum),
    "Mod": _mod,
    "Mul": binary(np.multiply),
    "Neg": unary(np.negative),
    "Pow": _power,
    "Relu": unary(lambda x: np.maximum(x, x.dtype.type(0))),
    "Round": unary(np.rint),
    "Sign": unary(np.sign),
    "Sub": binary(np.subtract),
}
