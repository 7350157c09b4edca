"""General Quantizer: weights fall onto centroids that learn, without a regularizer.

Source: Zhen et al., "Sub-8-bit quantization for on-device speech recognition: a
regularization-free approach", arXiv:2210.09188: "soft-to-hard" compression by an annealed softmax,
with self-adjustable centroids in a space constrained by the mu-law. Its equations were not at hand;
those below are ours.

As a share of its channel's range a weight v lies in [-1, 1] and is compared with K = 2^bits
centroids after F(v) = sign(v) log(1 + mu |v|) / log(1 + mu), so that evenly spaced centroids are
denser near zero. Softmax over -(F(v) - theta_k)^2 / temperature mixes them; beyond the two nearest
the shares are below 2 % from the start, and are left out, so that a step is linear in the weights.
At the end each weight is its nearest centroid, and the straight-through estimate takes the place of
the softmax.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from onnx_intq.codebook import CodedWeight, code
from onnx_intq.straight_through import LARGEST, nearest
from onnx_intq.weight_quantizer import WeightQuantizer

SOFT = 0.1
"""Share of the training in which weights are mixtures of centroids."""
SHARPNESS = (4.0, 200.0)
"""One over the temperature, at the start and at the end of the soft part, in squared gaps."""
FREEZE = 0.9
"""From this share on centroids no longer move, so that the weights settle around them."""


class GeneralQuantizer(WeightQuantizer):
    """Centroids shared by all channels, learnt in a mu-law space, kept sorted.

    Attributes:
        theta: The centroids in the companded space, float32 [K], ascending, within [-1, 1].
        mu: How much denser the centroids may lie near zero; above 0.
    """

    def __init__(
        self,
        weight: npt.NDArray[np.float32],
        axis: int | None,
        bits: int,
        *,
        mu: float = 1.0,
        start: CodedWeight | None = None,
    ) -> None:
        """Start from `start`, by default the best codebook that needs no training."""
        start = start or code(weight, axis, bits, "lloyd")
        super().__init__(weight, start.scales, axis, bits)
        self.mu = mu
        levels = np.unique(start.stored).astype(np.float32) / np.float32(LARGEST)
        self.theta = nn.Parameter(self._compand(torch.from_numpy(_padded(levels, 1 << bits))))

    def forward(self, progress: float, /) -> Tensor:
        """The mixture, later the nearest centroid, times the scale; see the base class."""
        soft = progress < SOFT
        values = self._soft(progress / SOFT) if soft else nearest(self.latent, self._levels())
        return values * self.log_scale.exp()

    def coded(self) -> CodedWeight:
        """The nearest centroids, in int8."""
        return self.stored_with(nearest(self.latent, self._levels()))

    def after_step(self, progress: float) -> None:
        """Sort the centroids."""
        with torch.no_grad():
            self.theta.copy_(self.theta.clamp(-1, 1).sort().values)
        self.theta.requires_grad_(progress < FREEZE)

    def _soft(self, done: float) -> Tensor:
        """Shares of the two nearest centroids by the softmax of their squared distances."""
        theta, gap = self.theta, 2 / ((1 << self.bits) - 1)
        alpha = SHARPNESS[0] * (SHARPNESS[1] / SHARPNESS[0]) ** done / gap**2
        y = self._compand((self.latent / LARGEST).clamp(-1, 1))
        below = torch.bucketize(y.detach(), theta.detach()[1:-1], out_int32=True)
        low, high = theta[below], theta[below + 1]
        share = torch.sigmoid(alpha * (high - low) * (2 * y - low - high))
        return self._expand(low + share * (high - low)) * LARGEST

    def _levels(self) -> Tensor:
        """The centroids as whole steps; gradients pass the rounding."""
        exact = self._expand(self.theta) * LARGEST
        return exact + (exact.detach().round() - exact.detach())

    def _compand(self, v: Tensor) -> Tensor:
        return v.sign() * torch.log1p(self.mu * v.abs()) / math.log1p(self.mu)

    def _expand(self, y: Tensor) -> Tensor:
        return y.sign() * torch.expm1(y.abs() * math.log1p(self.mu)) / self.mu


def _padded(levels: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    """As many levels as there may be: the widest gaps are halved."""
    values = list(map(float, levels)) if len(levels) > 1 else [-1.0, *map(float, levels)]
    while len(values) < count:
        gaps = np.diff(values)
        widest = int(gaps.argmax())
        values.insert(widest + 1, values[widest] + gaps[widest] / 2)
    return np.asarray(values, np.float32)
