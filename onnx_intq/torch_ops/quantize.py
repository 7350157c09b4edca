"""QuantizeLinear and DequantizeLinear, with a straight-through gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onnx_intq.torch_ops.dtypes import torch_dtype


def _along(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point so that it broadcasts with `x`: one, per channel, or per block."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    if block_size:
        return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape(-1, *(1,) * (x.ndim - 1 - axis % x.ndim))


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: int = 1,  # noqa: ARG001
    precision: int = 0,  # noqa: ARG001
) -> Tensor:
    """Integers; where a gradient flows they are held in a floating-point tensor.

    The gradient is that of x / scale + zero_point inside the grid and 0 outside (Bengio et al.,
    2013): rounding counts as the identity.
    """
    dtype = torch_dtype(output_dtype) if output_dtype else torch.uint8
    dtype = dtype if zero_point is None else zero_point.dtype
    grid = torch.iinfo(dtype)
    ratio = x / _along(scale, x, axis, block_size)
    rounded = ratio + (torch.round(ratio) - ratio).detach()
    if zero_point is not None:
        rounded = rounded + _along(zero_point, x, axis, block_size)
    integers = rounded.clamp(grid.min, grid.max)
    return integers if integers.requires_grad else integers.to(dtype)


def _dequantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    centred = x if x.is_floating_point() else x.to(torch.int32)
    if zero_point is not None:
        centred = centred - _along(zero_point, x, axis, block_size).to(centred.dtype)
    y = centred.to(scale.dtype) * _along(scale, x, axis, block_size)
    return y.to(torch_dtype(output_dtype)) if output_dtype else y


OPS: dict[str, Callable[..., Tensor]] = {
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
}
