"""Uniform levels with a learnt scale per channel: the comparator of codebooks.

Source: Esser et al., "Learned step size quantization", arXiv:1902.08153, with the master weights
in units of the scale, so that the scale's gradient is that of the result alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onnx_intq.codebook import CodedWeight, code
from onnx_intq.straight_through import LARGEST, nearest
from onnx_intq.weight_quantizer import WeightQuantizer


class UniformQuantizer(WeightQuantizer):
    """2^bits - 1 even levels around zero (two, without zero, for one bit).

    Attributes:
        levels: In steps, float32 [K], ascending.
    """

    levels: Tensor

    def __init__(self, weight: npt.NDArray[np.float32], axis: int | None, bits: int) -> None:
        """Start from the scales of least squared error."""
        start = code(weight, axis, bits, "uniform")
        highest = max(1, (1 << (bits - 1)) - 1)
        whole = np.arange(-highest, highest + 1) if bits > 1 else np.array([-1, 1])
        unit = LARGEST // highest  # one learning rate for all widths
        scales = start.scales * np.float32(np.abs(start.stored).max() / (unit * highest))
        super().__init__(weight, scales, axis, bits)
        self.register_buffer("levels", torch.from_numpy((whole * unit).astype(np.float32)))

    def forward(self, _progress: float, /) -> Tensor:
        """The nearest level, times the scale."""
        return nearest(self.latent, self.levels) * self.log_scale.exp()

    def coded(self) -> CodedWeight:
        """The nearest levels, in int8."""
        return self.stored_with(nearest(self.latent, self.levels))
