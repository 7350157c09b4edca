"""Sums of products whose factors have 16 bits, as sums of products of bytes: exact in integers.

A factor x of 16 bits is 256 * high + low, and so is what it means: with the zero point's own bytes,

    x - zero_point = 256 * (high - zero_point // 256) + (low - zero_point % 256)

both counted from the grid's lowest integer, so that all four bytes are within 0..255. Each byte
keeps a zero point of its own that stands for real 0: what a convolution pads with stays 0.
A sum of products is then linear in the bytes: 256 * sum(high) + sum(low), where either sum is one
of 8-bit factors, as ConvInteger and MatMulInteger take them. Nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from onnx_intq.grid import Grid
from onnx_intq.lowering import CannotLowerError, Operand
from onnx_intq.trace import Builder, Value, bounded

BITS = 8
"""Of a byte."""


@dataclass(frozen=True, kw_only=True)
class Digit:
    """A byte of an operand, itself an operand.

    Attributes:
        operand: 8 bits; its scale is that of the whole operand times `place`.
        place: 1 or 256: what one step of it is in steps of the whole operand.
    """

    operand: Operand
    place: int


def digits(x: Operand, builder: Builder, *, signed: bool = False) -> tuple[Digit, ...]:
    """An operand's bytes, the high one first: itself if it has 8 bits, else two.

    Args:
        x: 8 or 16 bits.
        builder: Takes the nodes.
        signed: Two bytes become int8 in place of uint8, 128 lower like their zero points.
    """
    if x.grid.bits == BITS:
        return (Digit(operand=x, place=1),)
    raised = x.stored(builder) - x.grid.low
    high: Any = raised >> BITS
    low = bounded(raised - (high << BITS), 0, (1 << BITS) - 1)
    grid = Grid(BITS, signed=signed)
    zero_points = divmod(x.zero_point - x.grid.low, 1 << BITS)
    found = []
    for value, place, zero_point in zip((high, low), (1 << BITS, 1), zero_points, strict=True):
        part = replace(
            x,
            tensor=(value + grid.low).astype(grid.dtype),
            scale=x.scale * place,
            zero_point=zero_point + grid.low,
            grid=grid,
        )
        found.append(Digit(operand=part, place=place))
    return tuple(found)


def total(terms: Iterable[tuple[int, Value]], low: int, high: int) -> Value:
    """The sum of place values times sums of products, known to lie in [low, high].

    Args:
        terms: Place and int32 sums; their bounds are what can be, not what fits.
        low: The lowest total there can be.
        high: The highest.

    Raises:
        CannotLowerError: A sum of products can exceed the 32 bits it is made in.
    """
    found: Any = 0
    for place, value in terms:
        if max(-value.low, value.high) >= 1 << 31:
            raise CannotLowerError(
                "an accumulator exceeds 32 bits; expected fewer or smaller products; "
                "keep the node float"
            )
        found = (value if place == 1 else value * place) + found
    whole: Value = found.narrowed(low, high)
    return whole
