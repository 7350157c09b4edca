"""What the passes for Conv, ConvTranspose, Gemm and MatMul share: weights, biases, accumulators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant
from onnx_intq.grid import Dyadic, dyadic
from onnx_intq.lowering import CannotLowerError, Operand, Site
from onnx_intq.place_values import Digit, total
from onnx_intq.qdq import dequantizer, has_input
from onnx_intq.requantization import Step, emit
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import IntqError

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A constant factor as integers: real = centred * scales.

    Attributes:
        centred: int64, zero point taken off; the shape of the stored weight.
        scales: float64, scalar or one per index of `axis`.
        axis: Of the scales; 0 where there is one scale only.
    """

    centred: Int64
    scales: npt.NDArray[np.float64]
    axis: int


def weight(tensor: gs.Tensor) -> Weight:
    """The integers of a dequantized constant.

    Raises:
        CannotLowerError: The tensor is not made so, or has scales per block.
    """
    maker = dequantizer(tensor)
    stored, scales = (constant(maker, 0), constant(maker, 1)) if maker else (None, None)
    blocks = maker is not None and maker.attrs.get("block_size", 0)
    if maker is None or stored is None or scales is None or blocks:
        raise CannotLowerError(f"its weight {tensor.name!r} is no constant with scales per channel")
    axis = maker.attrs.get("axis", 1) % max(stored.ndim, 1) if scales.size > 1 else 0
    zeros = np.zeros((), np.int64)
    if (given := constant(maker, 2)) is not None:
        shape = [-1 if i == axis else 1 for i in range(stored.ndim)] if given.size > 1 else ()
        zeros = given.astype(np.int64).reshape(shape)
    flat = np.squeeze(scales).astype(np.float64)
    return Weight(centred=stored.astype(np.int64) - zeros, scales=flat, axis=axis)


def unsigned(centred: Int64) -> tuple[npt.NDArray[np.uint8], int]:
    """Weights as uint8 and their zero point: onnxruntime's fast form on the left of a product.

    Raises:
        CannotLowerError: They span more than 8 bits.
    """
    fits = centred.min() >= -128 and centred.max() <= 127
    zero_point = 128 if fits else max(-int(centred.min()), 0)
    shifted = centred + zero_point
    if shifted.max() > 255 or zero_point > 255:
        raise CannotLowerError(f"its weights span {centred.min()}..{centred.max()}, over 8 bits")
    return shifted.astype(np.uint8), zero_point


def bias(site: Site) -> npt.NDArray[Any] | None:
    """The values of a convolution's bias; None without.

    Raises:
        CannotLowerError: It is computed at run time.
    """
    values = site.values(2)
    if values is None and has_input(site.node, 2):
        raise CannotLowerError("its bias is computed at run time")
    return values


def check_cpu(cpu: str) -> None:
    """Refuse what no processor is called.

    Raises:
        IntqError: It is neither "any" nor "vnni".
    """
    if cpu not in {"any", "vnni"}:
        raise IntqError(f"cpu {cpu!r}; expected 'any' or 'vnni'")


def step(
    site: Site, x: Operand, w: Weight, rows: Int64, bias: npt.NDArray[Any] | None, alpha: float = 1
) -> Step:
    """The requantisation of the accumulators sum(w * (x - zero point)), of 8 or 16 bits of x.

    Args:
        site: Gives the result's grid and limits.
        x: The other factor.
        w: The weight; its scales are scalar or one per row.
        rows: [channels, taps], the weights that are summed in one accumulator.
        bias: Real values, scalar or [channels]; None without.
        alpha: Factor of the product.
    """
    channels = len(rows)
    steps = np.broadcast_to(x.scale * w.scales * alpha, (channels,))
    multiplier = dyadic(steps / site.result.scale, 62 - site.result.grid.bits)
    low, high = reach(x, rows)
    if bias is None:
        biases = np.zeros(channels)
    else:
        # In float32, as onnxruntime does it: where a bias lies between two steps, both agree.
        step32 = np.float32(x.scale) * w.scales.astype(np.float32) * np.float32(alpha)
        biases = np.rint(np.broadcast_to(bias / step32, (channels,)).astype(np.float64))
    check_bias(biases, x.grid.bits)
    return Step(
        multiplier=Dyadic(multiplier.b.astype(np.int64), multiplier.c.astype(np.int64)),
        bias=biases.astype(np.int64),
        low=low,
        high=high,
        zero_point=site.result.zero_point,
        first=site.first,
        last=site.last,
    )


def convolution(
    site: Site,
    builder: Builder,
    x: Iterable[Digit],
    w: Weight,
    chosen: Step,
    attrs: Mapping[str, Any],
) -> Value:
    """Convolve the bytes of an input with one weight; requantise their sum.

    Args:
        site: Gives the result's grid and shape.
        builder: Takes the nodes.
        x: The input's bytes.
        w: [outputs, inputs per group, kernel].
        chosen: The requantisation of the sum.
        attrs: Of ConvInteger.

    Raises:
        IntqError: An accumulator exceeds 32 bits, or the weight 8.
    """
    stored, zero_point = unsigned(w.centred)
    weights = [builder.constant(v, np.uint8) for v in (stored, zero_point)]
    rows, terms = w.centred.reshape(len(stored), -1), []
    for digit in x:
        part = digit.operand
        zero = builder.constant(part.zero_point, part.grid.dtype)
        inputs = [part.tensor, weights[0], zero, weights[1]]
        shape = site.node.outputs[0].shape
        acc = builder.node("ConvInteger", inputs, np.int32, shape, **attrs)
        low, high = reach(part, rows)
        terms.append((digit.place, builder.value(acc, int(low.min()), int(high.max()))))
    value = total(terms, int(chosen.low.min()), int(chosen.high.max()))
    return emit(value, chosen, site.result.grid, (len(stored), *(1,) * (stored.ndim - 2)))


def reach(x: Operand, rows: Int64) -> tuple[Int64, Int64]:
    """The lowest and highest sums of rows * (x - zero point) there can be: int64 [channels] each.

    Args:
        x: The other factor, 8 or 16 bits.
        rows: [channels, taps].
    """
    products = rows * (x.grid.low - x.zero_point), rows * (x.grid.high - x.zero_point)
    return np.minimum(*products).sum(axis=1), np.maximum(*products).sum(axis=1)


def check_bias(biases: npt.NDArray[np.float64], bits: int) -> None:
    """Refuse a bias, in steps of the accumulator, that has no room beside it.

    Args:
        biases: Any shape.
        bits: Of the input: one of 16 bits has smaller steps, and an accumulator of 64 bits.

    Raises:
        CannotLowerError: It needs over 32 bits, or 40 for an input of 16.
    """
    most = 31 if bits == 8 else 39
    if np.abs(biases).max(initial=0) >= 1 << most:
        raise CannotLowerError(
            f"its bias exceeds {most + 1} bits in steps of input scale x weight scale"
        )
