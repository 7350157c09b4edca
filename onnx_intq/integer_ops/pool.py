"""MaxPool on integers."""

from __future__ import annotations

import functools

import numpy as np

from onnx_intq.integer_ops.arrays import Array, Function, integer_range
from onnx_intq.integer_ops.windows import Windows


def _max_pool(
    x: Array,
    *,
    kernel_shape: list[int],
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,
    outputs: int,
) -> Array | tuple[Array, Array]:
    view = Windows.over(x.shape[2:], kernel_shape, strides, pads, dilations, auto_pad, ceil_mode)
    seen = list(view.taps(view.pad(x, integer_range(x.dtype)[0])))
    if outputs == 1:
        return functools.reduce(np.maximum, seen)
    return _max_and_index(x, np.stack(seen), view, storage_order)


def _max_and_index(x: Array, seen: Array, view: Windows, storage_order: int) -> tuple[Array, Array]:
    """Maxima, and the place of each in `x` laid out flat, columns first if storage_order is 1."""
    places = np.arange(x.size).reshape(x.shape)
    if storage_order:
        places = places.reshape(x.shape[:-2] + x.shape[:-3:-1]).swapaxes(-1, -2)
    # Where the lowest value stands in the padding and in the window, the window's place counts.
    places = np.stack(list(view.taps(view.pad(places, -1))))
    best = np.where(places < 0, -1, seen.astype(np.int64) - integer_range(x.dtype)[0]).argmax(0)
    index = np.take_along_axis(places, best[None], 0)[0]
    return np.take_along_axis(seen, best[None], 0)[0], index


OPS: dict[str, Function] = {"MaxPool": _max_pool}
