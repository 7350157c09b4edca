"""Convolutions of 8-bit integers: ConvInteger and QLinearConv, over any number of axes."""

from __future__ import annotations

import numpy as np

from onnx_intq.integer_ops.arrays import Array, Function, centred, fitting, reach
from onnx_intq.integer_ops.quantize import requantized
from onnx_intq.integer_ops.windows import Windows


def _conv_integer(
    x: Array,
    w: Array,
    x_zero_point: Array | None = None,
    w_zero_point: Array | None = None,
    *,
    kernel_shape: list[int] | None = None,  # noqa: ARG001
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
) -> Array:
    view = Windows.over(x.shape[2:], w.shape[2:], strides, pads, dilations, auto_pad)
    # Padding holds x's zero point, that is zeros behind the subtraction.
    return fitting(_sums(x, w, x_zero_point, w_zero_point, view, group), np.int32)


def _qlinear_conv(
    x: Array,
    x_scale: Array,
    x_zero_point: Array,
    w: Array,
    w_scale: Array,
    w_zero_point: Array,
    y_scale: Array,
    y_zero_point: Array,
    bias: Array | None = None,
    *,
    kernel_shape: list[int] | None = None,  # noqa: ARG001
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
) -> Array:
    view = Windows.over(x.shape[2:], w.shape[2:], strides, pads, dilations, auto_pad)
    sums = _sums(x, w, x_zero_point, w_zero_point, view, group)
    spatial = (1,) * (x.ndim - 2)
    if bias is not None:
        sums = sums + bias.reshape(-1, *spatial)
    scale = w_scale.reshape(-1, *spatial) if w_scale.size > 1 else w_scale.reshape(())
    return requantized(fitting(sums, np.int32), x_scale, scale, y_scale, y_zero_point)


def _sums(
    x: Array,
    w: Array,
    x_zero_point: Array | None,
    w_zero_point: Array | None,
    view: Windows,
    group: int,
) -> Array:
    """The exact sums of products, less the zero points: [N, M, *windows].

    Args:
        x: 8-bit, [N, C, *spatial].
        w: 8-bit, [M, C / group, *kernel].
        x_zero_point: One, or None for 0.
        w_zero_point: One or one per output channel [M], or None for 0.
        view: The windows.
        group: Groups of channels that do not mix.
    """
    if w_zero_point is not None and w_zero_point.size > 1:
        w_zero_point = w_zero_point.reshape(-1, *(1,) * (w.ndim - 1))
    padded = view.pad(centred(x, x_zero_point))
    taps = centred(w, w_zero_point).reshape(group, w.shape[0] // group, w.shape[1], -1)
    run = _depthwise if taps.shape[2] == 1 else _dense
    sums = run(padded.reshape(len(x), group, -1, *padded.shape[2:]), taps, view)
    return sums.reshape(len(x), w.shape[0], *sums.shape[3:])


def _dense(x: Array, w: Array, view: Windows) -> Array:
    """Sums over channels and taps, one matrix product per tap.

    Args:
        x: int32, [N, group, C, *padded].
        w: int32, [group, M, C, taps].
        view: The windows.

    Returns:
        int64, [N, group, M, *windows].
    """
    # Exact in float64, and so in BLAS, whatever its order of summation: operands of 8 bits less a
    # zero point are at most 255, products below 2^16, and less than 2^37 of them are added up, so
    # every partial sum is an integer below 2^53.
    weights = w.astype(np.float64)
    seen = list(view.taps(_merged(x.astype(np.float64))))
    total: Array = np.zeros(())
    for tap, patch in enumerate(seen):
        total = total + np.matmul(weights[..., tap], patch.reshape(*x.shape[:3], -1))
    return total.astype(np.int64).reshape(*total.shape[:3], *seen[0].shape[2:])


def _depthwise(x: Array, w: Array, view: Windows) -> Array:
    """As `_dense` for one input channel per group, vectorised over channels and windows."""
    bound = reach(x) * reach(w) * w.shape[3]
    dtype = np.int32 if bound < 1 << 31 else np.int64
    spatial = (1,) * (x.ndim - 3)
    weights = w.astype(dtype)
    total: Array = np.zeros((), dtype)
    for tap, patch in enumerate(view.taps(_merged(x.astype(dtype)))):
        channels = patch.reshape(*x.shape[:2], 1, *patch.shape[2:])
        total = total + weights[:, :, 0, tap].reshape(*w.shape[:2], *spatial) * channels
    return total


def _merged(x: Array) -> Array:
    """[N, group, C, *spatial] as [N, group * C, *spatial]."""
    return x.reshape(len(x), -1, *x.shape[3:])


OPS: dict[str, Function] = {
    "ConvInteger": _conv_integer,
    "QLinearConv": _qlinear_conv,
}
