"""Sliding windows as ONNX describes them: kernel, strides, dilations, pads, auto_pad, ceil_mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


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

    @classmethod
    def over(
        cls,
        spatial: Sequence[int],
        kernel: Sequence[int],
        strides: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
    ) -> Self:
        """The windows over lengths `spatial`, every ONNX default and `auto_pad` resolved.

        With `ceil_mode` the end is padded until the last, partial window fits, unless that window
        would begin in the padding.

        Raises:
            ValueError: The kernel is longer than the padded input.
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
            if length + begins[i] + ends[i] < extent:
                raise ValueError(f"a kernel of extent {extent} over {length} elements")
            if ceil_mode:
                steps = -(-(length + begins[i] + ends[i] - extent) // strides[i])
                if steps * strides[i] >= length + begins[i]:
                    steps -= 1
                ends[i] = steps * strides[i] + extent - length - begins[i]
        return cls(
            kernel=tuple(kernel),
            strides=tuple(strides),
            dilations=tuple(dilations),
            begins=tuple(begins),
            ends=tuple(ends),
        )
