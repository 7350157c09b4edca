"""Sliding windows over torch tensors."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnx_intq import windows


class Windows(windows.Windows):
    """Windows over the spatial axes of a tensor."""

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
