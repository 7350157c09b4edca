"""S8BQAT: weights are drawn to fixed centroids by a periodic regularizer.

Source: Zhen et al., "Sub-8-bit quantization aware training for 8-bit neural network accelerator
with on-device speech recognition", arXiv:2206.15408: Lloyd-Max centroids of the float weights, the
multi-regional absolute cosine regularizer, and a hard compression now and then. Its equations were
not at hand; those below are ours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onnx_intq.codebook import CodedWeight, code
from onnx_intq.straight_through import nearest
from onnx_intq.weight_quantizer import WeightQuantizer

COMPRESSED_EVERY = 50
"""Steps between two hard compressions of the weights themselves."""
LAST = 0.9
"""From this share of the training on weights are compressed at every step."""


class RegularizedQuantizer(WeightQuantizer):
    """Float weights, fixed centroids, and a penalty on what lies between them.

    Attributes:
        levels: The centroids in steps, float32 [K], ascending.
        steps: How many steps of the optimizer there were, int64 [].
    """

    levels: Tensor
    steps: Tensor

    def __init__(self, weight: npt.NDArray[np.float32], axis: int | None, bits: int) -> None:
        """Find the centroids of a float weight."""
        start = code(weight, axis, bits, "lloyd")
        super().__init__(weight, start.scales, axis, bits)
        self.log_scale.requires_grad_(False)
        levels = np.unique(start.stored).astype(np.float32)
        self.register_buffer("levels", torch.from_numpy(levels))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, progress: float, /) -> Tensor:
        """The weight as it is; at the end its nearest centroid."""
        values = self.latent if progress < 1 else nearest(self.latent.detach(), self.levels)
        return values * self.log_scale.exp()

    def penalty(self) -> Tensor:
        """Mean of |sin(pi t)|, t the place between two centroids: 0 on them, 1 half-way."""
        below = torch.bucketize(self.latent.detach(), self.levels[1:-1], out_int32=True)
        low, high = self.levels[below], self.levels[below + 1]
        share = ((self.latent - low) / (high - low)).clamp(-0.5, 1.5)
        return torch.sin(torch.pi * share).abs().mean()

    def after_step(self, progress: float) -> None:
        """Compress the weights now and then, at last always."""
        self.steps += 1
        if progress >= LAST or self.steps % COMPRESSED_EVERY == 0:
            with torch.no_grad():
                self.latent.copy_(nearest(self.latent.detach(), self.levels))

    def coded(self) -> CodedWeight:
        """The nearest centroids, in int8."""
        return self.stored_with(nearest(self.latent.detach(), self.levels))
