"""Convolution, transposed convolution and matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnx_intq.depthwise import depthwise_conv1d
from onnx_intq.torch_ops.windows import Windows

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_shape: list[int] | None = None,  # noqa: ARG001
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
) -> Tensor:
    view = Windows.over(x.shape[2:], weight.shape[2:], strides, pads, dilations, auto_pad)
    if x.ndim == 3 and group == x.shape[1] == weight.shape[0]:
        sides = (view.begins[0], view.ends[0])
        return depthwise_conv1d(x, weight, bias, view.strides[0], sides, view.dilations[0])
    if x.ndim == 3 and x.device.type == "cpu" and group == 1 and view.pointwise:
        # One product over all frames; channels innermost, as depthwise_conv1d has them, no copies.
        return F.linear(x.transpose(1, 2), weight[:, :, 0], bias).transpose(1, 2)
    padded, symmetric = (x, view.begins) if view.begins == view.ends else (view.pad(x), 0)
    return _CONV[x.ndim - 2](padded, weight, bias, view.strides, symmetric, view.dilations, group)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_shape: list[int] | None = None,  # noqa: ARG001
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
) -> Tensor:
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    full = _CONV_TRANSPOSE[rank](x, weight, None, strides, 0, 0, group, dilations)
    extra = output_padding or [0] * rank
    begins, ends = list((pads or [0] * rank)[:rank]), list((pads or [0] * rank)[-rank:])
    if auto_pad.startswith("SAME") and output_shape is None:
        output_shape = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    for i, length in enumerate((output_shape or [])[-rank:]):
        total = full.shape[2 + i] + extra[i] - length
        begins[i] = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
        ends[i] = total - begins[i]
    sides = [(-b, e - n) for b, n, e in zip(begins, ends, extra, strict=True)]
    y = F.pad(full, [n for pair in reversed(sides) for n in pair])
    return y if bias is None else y + bias.reshape(-1, *(1,) * rank)


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
    broadcast: int = 0,  # noqa: ARG001
) -> Tensor:
    y = torch.matmul(a.T if transA else a, b.T if transB else b)
    y = y if alpha == 1 else alpha * y
    return y if c is None else y + (c if beta == 1 else beta * c)


def _einsum(*tensors: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *tensors)


OPS: dict[str, Callable[..., Tensor]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Det": torch.det,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "MatMul": torch.matmul,
}
