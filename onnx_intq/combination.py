"""Sums of two quantized tensors, rounded once, in int32 where every pair of integers proves it.

`grid.weighted_sum` is the reference: factors with one exponent, in int64. Two 8-bit tensors have
65,536 pairs of values; a narrower set of factors that gives the same result for each of them is
the same function, and int32 is several times faster in onnxruntime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_intq.grid import common_exponent, weighted_sum
from onnx_intq.lowering import Site
from onnx_intq.requantization import WRAP, divided
from onnx_intq.trace import Builder, bounded
from onnx_intq.value import Value

TRIALS = 256
"""Divisors that are tried: each fits with a chance of about one in ten."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One addend: (stored - zero_point) * factor, in steps of the result."""

    value: Value
    zero_point: int
    factor: float


@dataclass(frozen=True)
class Division:
    """(sum of stored * factor + offset) / divisor, all in int32."""

    factors: tuple[int, ...]
    offset: int
    divisor: int


def emit(builder: Builder, terms: Sequence[Term], site: Site) -> Value:
    """Add `terms` on the grid of `site`, within its limits."""
    base = site.first + (WRAP if site.result.grid.signed else 0)
    found = _division(terms, site, base) if site.result.grid.bits == 8 else None
    if found is None and (shifted := _shifted(builder, terms, site)) is not None:
        return shifted
    if found is None:
        total = _reference(site, terms, [t.value - t.zero_point for t in terms])
        return builder.value(total.astype(site.result.grid.dtype), site.first, site.last)
    total = sum(t.value * f for t, f in zip(terms, found.factors, strict=True))
    results = range(site.first, site.last + 1)
    return divided(total, found.offset, found.divisor, results, base, site.result.grid)


def _shifted(builder: Builder, terms: Sequence[Term], site: Site) -> Value | None:
    """The reference by a shift of bits, which onnxruntime has for unsigned integers alone.

    The sum is raised by a multiple of 2^c that makes the lowest one positive, and lowered after the
    shift: half the time of a comparison with 0 and a division of int64.

    Returns:
        None where a sum or a result may leave its type; or for TensorRT, which has no shift.
    """
    factors, c = common_exponent([t.factor for t in terms], 62 - site.result.grid.bits)
    ends = [(t.value.low - t.zero_point, t.value.high - t.zero_point) for t in terms]
    half, corners = 1 << (c - 1), [[f * e for e in x] for f, x in zip(factors, ends, strict=True)]
    low, high = (sum(pick(x) for x in corners) + half for pick in (min, max))
    raised = max(-(low >> c), 0)
    zeros = sum(f * t.zero_point for f, t in zip(factors, terms, strict=True))
    offset = half + (raised << c) - zeros
    # Every partial sum is within these.
    reach = sum(
        abs(f) * max(-t.value.low, t.value.high) for f, t in zip(factors, terms, strict=True)
    )
    if reach + abs(offset) >= 1 << 63 or (high >> c) + raised >= 1 << 30:
        return None
    if builder.target == "tensorrt":
        return None
    total: Any = offset
    for term, factor in zip(terms, factors, strict=True):
        total = term.value * factor + total
    bits = builder.constant(np.array(c), np.uint64)
    positive = bounded(total, 0, high + (raised << c)).astype(np.uint64)
    tensor = builder.node(
        "BitShift", [positive, bits], np.uint64, total.tensor.shape, direction="RIGHT"
    )
    most = (high >> c) + raised
    value: Any = builder.value(builder.value(tensor, 0, most).astype(np.int32), 0, most)
    result = np.clip(value + (site.result.zero_point - raised), site.first, site.last)
    return builder.value(result.astype(site.result.grid.dtype), site.first, site.last)


def _reference(site: Site, terms: Sequence[Term], centred: Sequence[Any]) -> Any:
    factors, c = common_exponent([t.factor for t in terms], 62 - site.result.grid.bits)
    return weighted_sum(
        centred,
        factors,
        c,
        zero_point=site.result.zero_point,
        low=site.first,
        high=site.last,
    )


def _division(terms: Sequence[Term], site: Site, base: int) -> Division | None:
    """A division that equals the reference for every combination of stored values."""
    if any(t.value.high - t.value.low > 255 for t in terms):
        return None
    stored = np.meshgrid(
        *(np.arange(t.value.low, t.value.high + 1, dtype=np.int64) for t in terms), indexing="ij"
    )
    centred = [q - t.zero_point for q, t in zip(stored, terms, strict=True)]
    wanted = _reference(site, terms, centred) - site.first + base
    last = base + site.last - site.first
    # With the least total at 0 or above, truncation is floor and no sign has to be looked after.
    reach = sum(abs(t.factor) * 256 for t in terms) + last + 1
    largest = int(((1 << 31) - 1) / (2 * reach))
    for divisor in range(largest, max(largest - TRIALS, 0), -1):
        factors = tuple(round(t.factor * divisor) for t in terms)
        constant = divisor // 2 + (base + site.result.zero_point - site.first) * divisor
        offset = constant - sum(f * t.zero_point for f, t in zip(factors, terms, strict=True))
        total = sum(q * f for q, f in zip(stored, factors, strict=True))
        quotient = np.where(total + offset >= 0, (total + offset) // divisor, -1)
        exact = np.array_equal(np.clip(quotient, base, last), wanted)
        if exact and _fits(total) and _fits(total + offset):
            return Division(factors, offset, divisor)
    return None


def _fits(total: Any) -> bool:
    return bool(np.abs(total).max() < 1 << 31)
