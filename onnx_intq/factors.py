"""The factors of a matrix product as 8-bit integers: constants and activations, either side.

A factor of 16 bits is two, its bytes: one product becomes two, or four where both factors have 16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant
from onnx_intq.grid import Grid
from onnx_intq.lowering import CannotLowerError, Operand, Site
from onnx_intq.place_values import BITS, Digit, digits
from onnx_intq.products import Int64, Weight, reach, step, unsigned, weight
from onnx_intq.qdq import dequantizer
from onnx_intq.requantization import Step
from onnx_intq.trace import LONGEST, Builder

LEFT, RIGHT = 0, 1
"""The inputs of a product."""
Factor: TypeAlias = tuple[gs.Tensor, int]
"""8-bit integers and their zero point."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One product of 8-bit integers.

    Attributes:
        factors: Left and right: each with its zero point.
        place: What its sums are multiplied by before they are added to those of other terms.
        low: Its lowest sum.
        high: Its highest sum.
    """

    factors: tuple[Factor, Factor]
    place: int
    low: int
    high: int


@dataclass(frozen=True, kw_only=True)
class Product:
    """Integers to multiply, and what the sums mean.

    Attributes:
        terms: What is added up.
        step: Requantisation of the sums, one entry per channel, without bias.
        units: float64, real units per step of a sum, in the shape in which a per-channel array
            broadcasts to the product.
    """

    terms: tuple[Term, ...]
    step: Step
    units: npt.NDArray[np.float64]


def by_weight(site: Site, builder: Builder, side: int, *, signed: bool) -> Product:
    """One factor is constant: uint8 with zero point 128, or int8 with 0."""
    w, x = _weight(site, side), site.operand(1 - side)
    store = _signed if side == RIGHT and signed else unsigned
    stored, zero_point = store(w.centred)
    channels: tuple[int, ...] = stored.shape[-2:-1] if side == LEFT else stored.shape[1:][-1:]
    if side == LEFT and channels and _rank(site, RIGHT) > 1:
        channels = (*channels, 1)
    summed = -1 if side == LEFT or stored.ndim == 1 else -2
    constant, terms = (builder.constant(stored, stored.dtype), zero_point), []
    rows = _extremes(w.centred, summed)
    for digit in _activation(site, builder, 1 - side, signed=signed):
        part = digit.operand.tensor, digit.operand.zero_point
        low, high = reach(digit.operand, rows)
        factors = (constant, part) if side == LEFT else (part, constant)
        ends = {"low": int(low.min()), "high": int(high.max())}
        terms.append(Term(factors=factors, place=digit.place, **ends))
    return Product(
        terms=tuple(terms),
        step=step(site, x, w, rows, None, alpha(site)),
        units=np.broadcast_to(x.scale * alpha(site) * w.scales, channels[:1]).reshape(channels),
    )


def by_activation(site: Site, builder: Builder, *, signed: bool) -> Product:
    """Both factors are computed; the sum is as long as their shapes say, or `LONGEST`."""
    left, right = (_activation(site, builder, side, signed=signed) for side in (LEFT, RIGHT))
    tensors = [digits[0].operand.tensor for digits in (left, right)]
    sizes = [_size(tensors[0], -1), _size(tensors[1], -2 if _rank(site, RIGHT) > 1 else -1)]
    length = min((size for size in sizes if size), default=LONGEST)
    terms = []
    for p, q in product(left, right):
        low, high = _corners(length, p.operand, q.operand)
        x, y = ((part.tensor, part.zero_point) for part in (p.operand, q.operand))
        terms.append(Term(factors=(x, y), place=p.place * q.place, low=low, high=high))
    a, b = site.operand(LEFT), site.operand(RIGHT)
    low, high = sum(t.place * t.low for t in terms), sum(t.place * t.high for t in terms)
    alone = Weight(centred=np.zeros(1, np.int64), scales=np.asarray(b.scale), axis=0)
    found = step(site, a, alone, np.zeros((1, 1), np.int64), None, alpha(site))
    return Product(
        terms=tuple(terms),
        step=replace(found, low=np.array([low]), high=np.array([high])),
        units=np.asarray(a.scale * b.scale * alpha(site)),
    )


def _corners(length: int, a: Operand, b: Operand) -> tuple[int, int]:
    """The lowest and highest sum of `length` products."""
    ends = [(x.grid.low - x.zero_point, x.grid.high - x.zero_point) for x in (a, b)]
    corners = [length * p * q for p in ends[0] for q in ends[1]]
    return min(corners), max(corners)


def _weight(site: Site, side: int) -> Weight:
    """The constant factor, transposed as Gemm says; its scales run along the result's axis."""
    w = weight(site.node.inputs[side])
    centred, axis = w.centred, w.axis
    if _transposed(site, side):
        centred, axis = centred.T, 1 - axis
    if w.scales.size > 1 and (centred.ndim < 2 or axis != centred.ndim - (2 - side)):
        raise CannotLowerError("its weight has scales along the axis that is summed")
    return Weight(centred=centred, scales=w.scales, axis=axis)


def _activation(site: Site, builder: Builder, side: int, *, signed: bool) -> tuple[Digit, ...]:
    """The computed factor, transposed as Gemm says: uint8, or int8 on the right if `signed`."""
    x = site.operand(side)
    if _transposed(site, side):
        shape = None if x.tensor.shape is None else list(reversed(x.tensor.shape))
        tensor = builder.node("Transpose", [x.tensor], x.grid.dtype, shape, perm=[1, 0])
        x = replace(x, tensor=tensor)
    wanted = side == RIGHT and signed
    if x.grid.bits == BITS:
        x = _with_sign(x, builder, signed=wanted)
    return digits(x, builder, signed=wanted)


def _with_sign(x: Operand, builder: Builder, *, signed: bool) -> Operand:
    """The same values in the type that onnxruntime multiplies fast on this side."""
    if x.grid.signed == signed:
        return x
    grid, offset = Grid(8, signed=signed), -128 if signed else 128
    tensor = (x.stored(builder) + offset).astype(grid.dtype)
    return replace(x, tensor=tensor, zero_point=x.zero_point + offset, grid=grid)


def _signed(centred: Int64) -> tuple[npt.NDArray[Any], int]:
    """Weights as int8 and their zero point; as uint8 where they do not fit."""
    if centred.min() >= -128 and centred.max() <= 127:
        return centred.astype(np.int8), 0
    return unsigned(centred)


def _extremes(centred: Int64, axis: int) -> Int64:
    """[channels, 2]: the largest sum of positive and the lowest sum of negative weights.

    A product's bounds follow from them as from all taps, as real 0 lies on every grid.
    """
    positive, negative = np.maximum(centred, 0).sum(axis), np.minimum(centred, 0).sum(axis)
    channels = positive.shape[-1] if positive.ndim else 1
    highest = positive.reshape(-1, channels).max(axis=0)
    return np.stack([highest, negative.reshape(-1, channels).min(axis=0)], axis=1)


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether a factor is stored, in float or as integers."""
    maker = dequantizer(tensor)
    return isinstance(tensor, gs.Constant) or (maker is not None and constant(maker, 0) is not None)


def _transposed(site: Site, side: int) -> bool:
    return bool(site.node.attrs.get("transA" if side == LEFT else "transB", 0))


def alpha(site: Site) -> float:
    """The factor of a Gemm's product, 1 for MatMul."""
    return float(site.node.attrs.get("alpha", 1.0))


def _rank(site: Site, side: int) -> int:
    shape = site.node.inputs[side].shape
    if shape is None:
        raise CannotLowerError(f"the rank of its input {site.node.inputs[side].name!r} is unknown")
    return len(shape)


def _size(tensor: gs.Tensor, axis: int) -> int | None:
    size = tensor.shape[axis] if tensor.shape is not None else None
    return size if isinstance(size, int) else None
