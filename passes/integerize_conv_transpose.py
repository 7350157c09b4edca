"""Turns quantized transposed convolutions into ConvInteger over a stretched input.

Before: `q = QuantizeLinear(ConvTranspose(DequantizeLinear(x), DequantizeLinear(w), b))`.
After: `q = requantize(ConvInteger(Reshape(Pad(Unsqueeze(x))), flipped w))`, all integers.
Pad puts stride - 1 zero points behind every element: a transposed convolution is a convolution of
that with the kernel reversed and its inputs and outputs exchanged (Dumoulin & Visin, "A guide to
convolution arithmetic for deep learning", section 4.5). Bias and activation go into requantisation.
An input of 16 bits is stretched and multiplied byte by byte (`onnx_intq.place_values`).
Condition: weights are constant; output_shape needs fixed sizes.
Law: every element equals `grid.requantize` of the exact sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.lowering import CannotLowerError, Operand, Site, lower
from onnx_intq.place_values import digits
from onnx_intq.products import Weight, bias, convolution, step, weight
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass

TO_THE_END = np.iinfo(np.int64).max
"""As an end of Slice."""


@dataclass(frozen=True, kw_only=True)
class IntegerizeConvTranspose(Pass):
    """Lower ConvTranspose."""

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        return lower(model, ctx, {"ConvTranspose"}, _emit)


def _emit(site: Site, builder: Builder) -> Value:
    node, x = site.node, site.operand(0)
    w = _flipped(weight(node.inputs[1]), node.attrs.get("group", 1))
    spatial = w.centred.ndim - 2
    strides = tuple(node.attrs.get("strides", (1,) * spatial))
    begin, end = _padding(node, w.centred.shape[2:], strides)
    stretched = []
    for digit in digits(x, builder):
        tensor = _stretched(builder, digit.operand, node, strides)
        longer = replace(digit.operand, tensor=_cropped(builder, tensor, begin, end))
        stretched.append(replace(digit, operand=longer))
    attrs = {
        "kernel_shape": list(w.centred.shape[2:]),
        "dilations": list(node.attrs.get("dilations", (1,) * spatial)),
        "pads": [max(p, 0) for p in (*begin, *end)],
        "group": node.attrs.get("group", 1),
    }
    chosen = step(site, x, w, w.centred.reshape(len(w.centred), -1), bias(site))
    return convolution(site, builder, stretched, w, chosen, attrs)


def _flipped(w: Weight, groups: int) -> Weight:
    """[inputs, outputs per group, kernel] as [outputs, inputs per group, reversed kernel]."""
    inputs, outputs, *kernel = w.centred.shape
    parts = w.centred.reshape(groups, inputs // groups, outputs, *kernel).swapaxes(1, 2)
    flipped = np.flip(parts, axis=tuple(range(3, parts.ndim)))
    scales = w.scales
    if scales.size > 1 and w.axis == 1:
        scales = np.tile(scales, groups)
    elif scales.size > 1 and inputs == groups:  # depthwise: each input has outputs of its own
        scales = np.repeat(scales, outputs)
    elif scales.size > 1:
        raise CannotLowerError("its weight has scales along another axis than output channels")
    centred = flipped.reshape(groups * outputs, inputs // groups, *kernel)
    return replace(w, centred=np.ascontiguousarray(centred), scales=scales, axis=0)


def _padding(
    node: gs.Node, kernel: Sequence[int], strides: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Zeros to add before and behind the stretched input; negative where it is cut."""
    count = len(kernel)
    dilations = node.attrs.get("dilations", (1,) * count)
    extra = node.attrs.get("output_padding", (0,) * count)
    spans = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    cut_begin, cut_end = _cut(node, spans, strides, extra)
    begin = [span - cut for span, cut in zip(spans, cut_begin, strict=True)]
    end = [
        span - cut + more - (stride - 1)
        for span, cut, more, stride in zip(spans, cut_end, extra, strides, strict=True)
    ]
    return begin, end


def _cut(
    node: gs.Node, spans: Sequence[int], strides: Sequence[int], extra: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The attribute pads, or what it would be: the ends of the full result that are left out."""
    mode, count = node.attrs.get("auto_pad", "NOTSET"), len(spans)
    wanted = node.attrs.get("output_shape")
    if wanted is None and not mode.startswith("SAME"):
        pads = node.attrs.get("pads", (0, 0) * count) if mode == "NOTSET" else (0, 0) * count
        return list(pads[:count]), list(pads[count:])
    if wanted is None and any(extra):  # ONNX and onnxruntime differ in the length of the result
        raise CannotLowerError("it has auto_pad and output_padding; expected pads")
    over = zip(spans, strides, extra, strict=True)
    totals = [span + 1 + more - stride for span, stride, more in over]
    if wanted is not None:
        totals = _beyond(node, wanted, spans, strides, extra)
    if min(totals) < 0:  # here, too
        raise CannotLowerError("its result is to be longer than its input reaches")
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return (less, more) if mode == "SAME_UPPER" else (more, less)


def _beyond(
    node: gs.Node,
    wanted: Sequence[int],
    spans: Sequence[int],
    strides: Sequence[int],
    extra: Sequence[int],
) -> list[int]:
    """How much longer the full result is than `wanted`."""
    shape = node.inputs[0].shape
    sizes = [] if shape is None else [size for size in shape[2:] if isinstance(size, int)]
    if len(sizes) != len(spans):
        raise CannotLowerError("its output_shape needs an input of fixed size")
    full = zip(sizes, strides, spans, extra, strict=True)
    lengths = [(size - 1) * stride + span + 1 + more for size, stride, span, more in full]
    return [length - size for length, size in zip(lengths, wanted[-len(spans) :], strict=True)]


def _stretched(builder: Builder, x: Operand, node: gs.Node, strides: Sequence[int]) -> gs.Tensor:
    """`x` with stride - 1 zero points behind every element, along each spatial axis."""
    tensor, rank = x.tensor, 2 + len(strides)
    shape = node.inputs[0].shape
    sizes = list(shape if shape is not None else (None,) * rank)
    for axis in reversed(range(2, rank)):
        stride = strides[axis - 2]
        if stride == 1:
            continue
        target = _stretched_shape(builder, tensor, sizes, axis)
        unit = builder.constant([axis + 1], np.int64)
        single = builder.node("Unsqueeze", [tensor, unit], x.grid.dtype)
        pads = np.zeros(2 * (rank + 1), np.int64)
        pads[rank + 1 + axis + 1] = stride - 1
        zero = builder.constant(x.zero_point, x.grid.dtype)
        inputs = [single, builder.constant(pads, np.int64), zero]
        padded = builder.node("Pad", inputs, x.grid.dtype)
        size = sizes[axis]
        sizes[axis] = size * stride if isinstance(size, int) else None
        tensor = builder.node("Reshape", [padded, target], x.grid.dtype)
    return tensor


def _stretched_shape(
    builder: Builder, tensor: gs.Tensor, sizes: Sequence[int | str | None], axis: int
) -> gs.Tensor:
    """What to reshape to: axes before stay, `axis` takes what is left, those behind are given."""
    front, behind = [0] * axis + [-1], sizes[axis + 1 :]
    fixed = [size for size in behind if isinstance(size, int)]
    if len(fixed) == len(behind):
        return builder.constant([*front, *fixed], np.int64)
    axes = builder.constant(range(axis + 1, len(sizes)), np.int64)
    shape = builder.node("Shape", [tensor], np.int64, [len(sizes)])
    known = builder.node("Gather", [shape, axes], np.int64, [len(behind)], axis=0)
    inputs = [builder.constant(front, np.int64), known]
    return builder.node("Concat", inputs, np.int64, [len(sizes)], axis=0)


def _cropped(
    builder: Builder, tensor: gs.Tensor, begin: Sequence[int], end: Sequence[int]
) -> gs.Tensor:
    if min(*begin, *end) >= 0:
        return tensor
    starts, ends = [max(-p, 0) for p in begin], [p if p < 0 else TO_THE_END for p in end]
    axes = range(2, 2 + len(starts))
    limits = [builder.constant(v, np.int64) for v in (starts, ends, axes)]
    return builder.node("Slice", [tensor, *limits], tensor.dtype)
