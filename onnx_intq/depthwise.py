"""Depthwise 1-D convolution on the CPU, in channels-last memory.

torch hands a 1-D convolution to oneDNN with the time axis innermost, where the depthwise kernels
cannot vectorise over channels. The same convolution with channels innermost, as a 2-D one of height
1, is several times as fast, and a network that keeps this memory order from layer to layer
(element-wise operators and products over channels do) pays for no copies. oneDNN has no fast kernel
for dilations: there the phases of the input, every `dilation`-th frame, are convolved separately.

One forward and backward pass for the input gradient, batch 8, in multiples of the time taken here
(AMD Zen 4, torch 2.13, 1 thread, medians of 11 interleaved runs; 2 threads give the same order):

    channels, frames, taps        256,250,33 512,250,51 512,250,63 512,250,75 512,250,87 256,500,33
    stride, dilation                 1, 1       1, 1       1, 1       1, 1       1, 2       2, 1
    here, from and to frames last    2.0        2.3        2.1        1.9        1.6        2.6
    conv1d                           6.3        8.4        8.2         13         15        8.7
    conv2d, channels last            0.9        1.0        0.9        1.0         46        1.0
    product of spectra (rfft)        5.5        5.5        3.5        3.4        3.4        5.7
    banded Toeplitz matrices         2.4        2.9        3.0        2.8        2.9        4.7
    unfold and einsum                 51         82         76         81        134         51

The Toeplitz matrices are the better of 32 and 64 outputs a block, made beforehand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnx_intq.depthwise_gradient import FEWEST, convolve

BFLOAT16_CHANNELS = 17
"""Fewest channels for operands of bfloat16: with up to 16, oneDNN never returns from 17 taps."""


def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv1d` with as many groups as channels; faster where oneDNN runs it.

    Args:
        x: Input [batch, channels, frames], any memory order; channels innermost costs no copy.
        weight: One filter per channel [channels, 1, taps].
        bias: [channels].
        stride: Frames from one output to the next.
        padding: Zeros before and after.
        dilation: Frames from one tap to the next.

    Returns:
        [batch, channels, (frames + sum(padding) - (taps - 1) * dilation - 1) // stride + 1].
    """
    if _has_fast_kernel(x):
        return channels_last_conv1d(x, weight, bias, stride, padding, dilation)
    padded, symmetric = x, padding[0]
    if padding[0] != padding[1]:
        padded, symmetric = F.pad(x, padding), 0
    return F.conv1d(padded, weight, bias, stride, symmetric, dilation, weight.shape[0])


def _has_fast_kernel(x: Tensor) -> bool:
    onednn = torch.backends.mkldnn
    usable = onednn.is_available() and onednn.enabled  # type: ignore[no-untyped-call]
    return bool(usable) and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def channels_last_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: tuple[int, int],
    dilation: int,
) -> Tensor:
    """What `depthwise_conv1d` returns, on any device and type, channels innermost in memory."""
    frames = x.transpose(1, 2)
    if dilation == 1:
        return _convolve(frames, weight, bias, stride, padding).transpose(1, 2)
    batch, length, channels = frames.shape
    outputs = length + sum(padding) - (weight.shape[2] - 1) * dilation
    whole = min(padding) // dilation  # padding that falls on whole rows of phases costs no copy
    before, after = (side - whole * dilation for side in padding)
    spare = -(before + length + after) % dilation
    if before or after or spare:
        frames = F.pad(frames, (0, 0, before, after + spare))
    phases = frames.reshape(batch, -1, dilation, channels).transpose(1, 2).flatten(0, 1)
    y = _convolve(phases, weight, bias, 1, (whole, whole))
    y = y.reshape(batch, dilation, -1, channels).transpose(1, 2).flatten(1, 2)
    return y[:, :outputs:stride].transpose(1, 2)


def _convolve(
    frames: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, int]
) -> Tensor:
    """[batch, frames, channels] -> [batch, outputs, channels]."""
    if weight.shape[0] < BFLOAT16_CHANNELS and _in_bfloat16(frames):
        given = (frames.float(), weight.float(), None if bias is None else bias.float())
        with torch.autocast("cpu", enabled=False):
            return _convolve(*given, stride, padding).to(torch.bfloat16)
    before, after = padding
    if before != after:
        frames, before = F.pad(frames, (0, 0, before, after)), 0
    image = frames.contiguous().unsqueeze(1).permute(0, 3, 1, 2)
    filters = weight.unsqueeze(2)
    if _has_slow_gradient(weight, stride, before):
        y = convolve(image, filters, before)
        y = y if bias is None else y + bias[:, None, None]
    else:
        y = F.conv2d(image, filters, bias, (1, stride), (0, before), groups=weight.shape[0])
    return y.permute(0, 2, 3, 1).squeeze(1)


def _in_bfloat16(frames: Tensor) -> bool:
    """Whether the CPU would multiply operands of bfloat16."""
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return frames.device.type == "cpu" and (cast or frames.dtype == torch.bfloat16)


def _has_slow_gradient(weight: Tensor, stride: int, before: int) -> bool:
    """Whether the filters are trained, and `depthwise_gradient` can help."""
    trained = weight.requires_grad and torch.is_grad_enabled()
    trained = trained and not torch.is_autocast_enabled("cpu")  # bfloat16 is fast enough
    fits = stride == 1 and before < weight.shape[2] >= FEWEST
    return trained and fits and weight.dtype == torch.float32 and weight.device.type == "cpu"
