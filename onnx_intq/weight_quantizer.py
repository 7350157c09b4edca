"""What quantization-aware training puts in a weight's place, whatever the scheme.

A quantizer owns its weight as `latent`, in steps of each channel's scale, so that one learning rate
suits channels of any size: behind a folded BatchNorm they differ by orders of magnitude.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from onnx_intq.codebook import CodedWeight

SMALLEST_SCALE = 1e-12
"""In place of 0 where a channel is dead, so that nothing is divided by 0."""


class WeightQuantizer(nn.Module, ABC):
    """A weight during training: master values, and their quantized form.

    Attributes:
        latent: The master values in steps of int8, float32, of the weight's shape.
        log_scale: Natural logarithm of each channel's step, broadcastable to the weight.
        bits: Width, 1..8: at most 2^bits values in each channel.
        axis: The weight's channel axis; None for one scale.
    """

    latent: nn.Parameter
    log_scale: nn.Parameter

    def __init__(
        self,
        weight: npt.NDArray[np.float32],
        scales: npt.NDArray[np.float32],
        axis: int | None,
        bits: int,
    ) -> None:
        """Take a weight and the scales [channels] or () of its channels."""
        super().__init__()
        self.axis, self.bits = axis, bits
        shape = [1] * weight.ndim
        if axis is not None:
            shape[axis] = weight.shape[axis]
        wide = np.maximum(scales, SMALLEST_SCALE).reshape(shape)
        self.latent = nn.Parameter(torch.from_numpy((weight / wide).astype(np.float32)))
        self.log_scale = nn.Parameter(torch.from_numpy(np.log(wide).astype(np.float32)))

    @abstractmethod
    def forward(self, progress: float, /) -> Tensor:
        """The quantized weight, differentiable in this module's parameters.

        Args:
            progress: Share of the training that is done, 0..1; 1 gives what will be stored.
        """

    @abstractmethod
    def coded(self) -> CodedWeight:
        """What will be stored; its `dequantized()` is `forward(1.0)`, bit for bit."""

    def penalty(self) -> Tensor | None:
        """A regularizer to be added to the loss, or None."""
        return None

    def after_step(self, progress: float) -> None:
        """Restore what a step of the optimizer may have broken."""

    def stored_with(self, levels: Tensor) -> CodedWeight:
        """The weight whose elements, in steps, are the whole numbers `levels`."""
        scales = self.log_scale.detach().exp().reshape(-1).numpy(force=True)
        return CodedWeight(
            stored=levels.detach().to(torch.int8).numpy(force=True),
            scales=scales if self.axis is not None else scales.reshape(()),
            axis=self.axis,
            bits=self.bits,
        )
