"""The exact integer square root: a table for the start, four Newton steps, one correction.

I-BERT's i-sqrt (Kim et al., arXiv:2101.01321, algorithm 4) starts from the number of bits and
repeats until the result stands still; ONNX graphs have neither. Here the start comes from a
comparison with the powers of four, and the number of steps is fixed by proof.

Proof, for 1 <= v < 2^62 and r = floor(sqrt(v)). Let x0 be the table's start and
x' = floor((x + floor(v / x)) / 2) = floor((x + v / x) / 2) a Newton step.

* No step ends below r: (x + v / x) / 2 >= sqrt(v) for every x > 0. So x >= 1, never a zero divisor.
* With x = sqrt(v) (1 + e), the step before its floor is sqrt(v) (1 + e^2 / (2 (1 + e))). The start
  is sqrt(2) 2^k rounded, for sqrt(v) in [2^k, 2^(k+1)): e is in (-0.293, 0.415) for k >= 10, so the
  four steps leave e <= 0.0612, 1.8e-3, 1.6e-6, 1.3e-12. The function is increasing for e >= 0 and
  floors only make x smaller, so they do no harm until x <= sqrt(v), where x = r.
* sqrt(v) 1.3e-12 < 2^31 * 1.3e-12 < 1, so x is r or r + 1 at the end; from x = r a step gives r or
  r + 1, too. The correction x - (x^2 > v) makes that r. x^2 <= 2^62 fits int64.

For k < 10 every v is tested.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_intq.trace import bounded, take

_POWERS_OF_FOUR = np.int64(1) << np.arange(0, 62, 2)

_STARTS = np.rint(np.sqrt(2.0) * 2.0 ** np.arange(-1, 31)).astype(np.int64)
"""By `bit_pairs`: about sqrt(2) 2^(pairs - 1). Entry 0 is never taken."""

_STEPS = 4


def bit_pairs(v: Any) -> Any:
    """How many pairs of bits hold `v`: p with 4^(p-1) <= v < 4^p, so 2^(p-1) <= sqrt(v) < 2^p.

    Args:
        v: int64 [..., 1], 1 <= v < 2^62; or a `trace.Value`.

    Returns:
        Integers 1..31, shape [..., 1].
    """
    reached = np.where(v >= _POWERS_OF_FOUR, 1, 0)  # [..., 31]: the last axis is of size 1
    return bounded(np.sum(reached, axis=-1, keepdims=True), 1, 31)


def isqrt(v: Any) -> Any:
    """floor(sqrt(max(v, 1))), exactly.

    Args:
        v: int64 [..., 1], v < 2^62; or a `trace.Value`.

    Returns:
        Integers 1 .. 2^31 - 1, shape [..., 1].
    """
    # Not np.maximum: onnxruntime's Max of int64 is wrong on x86-64 for operands that differ in bit
    # 31 and not above (https://github.com/microsoft/onnxruntime/pull/25280).
    v = bounded(np.where(v < 1, 1, v), 1, (1 << 62) - 1)
    return root(v, bit_pairs(v))


def root(v: Any, pairs: Any) -> Any:
    """As `isqrt`, for v >= 1 whose `bit_pairs` are known."""
    x = take(_STARTS, pairs)
    for _ in range(_STEPS):
        # 1 <= r <= x; x <= 1.0612 * 2^31 after the first step, and less after each.
        x = bounded((x + v // x) >> 1, 1, 1 << 32)
    x = bounded(x, 1, 1 << 31)  # r + 1 at most
    return bounded(x - np.where(x * x > v, 1, 0), 1, (1 << 31) - 1)
