"""Sliding windows as ONNX describes them: kernel, strides, dilations, pads, auto_pad, ceil_mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows over the spatial axes of one input.

    Attributes:
        kernel: Window length per axis, in taps.
        strides: Step from window to window per axis.
        dilations: Step from tap to tap per axis.
        begins: Padding before the first element per axis.
        ends: Padding after the last element per axis.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def pointwise(self) -> bool:
        """Whether each window is one element, and each element one window."""
        return {*self.kernel, *self.strides} == {1} and not any(self.begins + self.ends)

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """`x` [N, C, *spatial] with the padding filled by `value`; a negative one crops."""
        if not any(self.begins) and not any(self.ends):
            return x
        sides = zip(reversed(self.begins), reversed(self.ends), strict=True)
        return F.pad(x, [n for pair in sides for n in pair], value=value)

    def unfold(self, padded: Tensor) -> Tensor:
        """A view [N, C, *windows, *kernel] of a padded tensor."""
        axes = zip(self.kernel, self.strides, self.dilations, strict=True)
        for axis, (size, stride, dilation) in enumerate(axes, start=2):
            padded = padded.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        return padded


def windows(
    spatial: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
) -> Windows:
    """The windows over an input of lengths `spatial`, every ONNX default and `auto_pad` resolved.

    With `ceil_mode` the end is padded until the last, partial window fits, unless that window would
    begin in the padding.
    """
    rank = len(kernel)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    begins, ends = list((pads or [0] * rank)[:rank]), list((pads or [0] * rank)[-rank:])
    for i, length in enumerate(spatial):
        extent = (kernel[i] - 1) * dilations[i] + 1
        if auto_pad.startswith("SAME"):
            total = max((-(-length // strides[i]) - 1) * strides[i] + extent - length, 0)
            begins[i] = (total + (auto_pad == "SAME_LOWER")) // 2
            ends[i] = total - begins[i]
        if ceil_mode:
            steps = -(-(length + begins[i] + ends[i] - extent) // strides[i])
            if steps * strides[i] >= length + begins[i]:
                steps -= 1
            ends[i] = steps * strides[i] + extent - length - begins[i]
    return Windows(
        kernel=tuple(kernel),
        strides=tuple(strides),
        dilations=tuple(dilations),
        begins=tuple(begins),
        ends=tuple(ends),
    )
