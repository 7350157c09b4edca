"""Pooling windows of ONNX nodes, and their taps as slices: for types that have no pooling kernel.

A window with k places per axis is k slices, one per place, each with the elements that stand there
in all windows. Their maximum or sum is the pooled tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.lowering import CannotLowerError
from onnx_intq.value import Builder, Shape, Value

TO_THE_END = np.iinfo(np.int64).max
"""As an end of Slice."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where a pooling node looks, one entry per spatial axis.

    Attributes:
        kernel: Places.
        strides: Steps from one window to the next.
        dilations: Steps from one place to the next.
        begin: Elements that are added in front.
        end: Elements that are added behind.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def spans(self) -> tuple[int, ...]:
        """Elements from a window's first place to its last."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def padded(self) -> bool:
        """Whether anything is added."""
        return any(self.begin) or any(self.end)

    def counts(self, sizes: Sequence[int]) -> npt.NDArray[np.int64]:
        """How many places of every window are not padding.

        Args:
            sizes: Of the spatial axes.

        Returns:
            int64, one axis per spatial axis of the result.
        """
        found = np.ones((), np.int64)
        for axis, size in enumerate(sizes):
            span, padding = self.spans[axis], self.begin[axis] + self.end[axis]
            starts = np.arange(0, size + padding - span + 1, self.strides[axis])
            taps = np.arange(self.kernel[axis]) * self.dilations[axis]
            places = starts[:, None] + taps - self.begin[axis]
            found = np.multiply.outer(found, ((places >= 0) & (places < size)).sum(axis=1))
        return found.astype(np.int64)


def window(node: gs.Node) -> Window:
    """The window of a MaxPool or AveragePool node.

    Raises:
        CannotLowerError: The padding depends on a size that is not fixed, or the result's size is
            rounded up.
    """
    kernel = tuple(node.attrs["kernel_shape"])
    ones = (1,) * len(kernel)
    if node.attrs.get("ceil_mode", 0):
        raise CannotLowerError("it rounds the size of its result up (ceil_mode)")
    strides = tuple(node.attrs.get("strides", ones))
    dilations = tuple(node.attrs.get("dilations", ones))
    pads = list(node.attrs.get("pads", (0, 0) * len(kernel)))
    found = Window(
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        begin=tuple(pads[: len(kernel)]),
        end=tuple(pads[len(kernel) :]),
    )
    mode = node.attrs.get("auto_pad", "NOTSET")
    return _same(node, found, upper=mode == "SAME_UPPER") if mode.startswith("SAME") else found


def _same(node: gs.Node, plain: Window, *, upper: bool) -> Window:
    """With the padding that makes the result's size the input's, divided by the strides."""
    if any(d > 1 for d in plain.dilations):
        raise CannotLowerError("it has auto_pad with dilations, which onnxruntime pads as if dense")
    shape = node.inputs[0].shape
    sizes = list(shape[2:]) if shape is not None else [None] * len(plain.kernel)
    totals = []
    for size, span, stride in zip(sizes, plain.spans, plain.strides, strict=True):
        if stride == 1:
            totals.append(span - 1)
        elif isinstance(size, int):
            totals.append((-(-size // stride) - 1) * stride + span - size)
        else:
            raise CannotLowerError("its padding (auto_pad) depends on a length that is not fixed")
    if min(totals) < 0:
        raise CannotLowerError("it has auto_pad with strides that leave elements out")
    less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    begin, end = (less, more) if upper else (more, less)
    return Window(
        kernel=plain.kernel,
        strides=plain.strides,
        dilations=plain.dilations,
        begin=begin,
        end=end,
    )


def taps(x: Value, where: Window, fill: int, shape: Shape) -> list[Value]:
    """One slice of `x` per place of the window, int32, each of the size of the pooled tensor.

    Args:
        x: [batch, channels, spatial axes ...], any integer type but 64 bits.
        where: The window.
        fill: What padding holds.
        shape: Of the pooled tensor, None where unknown.
    """
    build = x.builder
    low, high, tensor = x.low, x.high, x.astype(np.int32)
    if where.padded:
        pads = build.constant([0, 0, *where.begin, 0, 0, *where.end], np.int64)
        tensor = build.node("Pad", [tensor, pads, build.constant(fill, np.int32)], np.int32)
        low, high = min(low, fill), max(high, fill)
    places = product(*(range(k) for k in where.kernel))
    return [build.value(_slice(build, tensor, where, p, shape), low, high) for p in places]


def _slice(
    build: Builder, tensor: gs.Tensor, where: Window, place: Sequence[int], shape: Shape
) -> gs.Variable:
    """All slices begin as many elements after the first place as they end before the last."""
    starts = [p * d for p, d in zip(place, where.dilations, strict=True)]
    left = [start - span + 1 for start, span in zip(starts, where.spans, strict=True)]
    ends = [end or TO_THE_END for end in left]
    axes = range(2, 2 + len(starts))
    limits = [build.constant(v, np.int64) for v in (starts, ends, axes, where.strides)]
    return build.node("Slice", [tensor, *limits], np.int32, shape)


def elements(builder: Builder, tensor: gs.Tensor, axes: Sequence[int], most: int) -> Value:
    """How many elements the axes have, at run time."""
    found = sizes(builder, tensor, axes)
    return builder.value(builder.node("ReduceProd", [found], np.int64, [], keepdims=0), 0, most)


def sizes(builder: Builder, tensor: gs.Tensor, axes: Sequence[int]) -> gs.Variable:
    """The lengths of the axes, at run time: int64 [axes]."""
    shape = builder.node("Shape", [tensor], np.int64)
    return builder.node(
        "Gather", [shape, builder.constant(axes, np.int64)], np.int64, [len(axes)], axis=0
    )
