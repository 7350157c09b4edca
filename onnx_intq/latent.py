"""Inputs as filtered white noise: what synthesis moves is the noise, what the network sees is not.

Neighbouring frames and neighbouring bands of a log-mel spectrogram are alike: over 104 utterances
of LibriSpeech their correlations are 0.91 and 0.95. Where every value of the input is moved by
itself, Adam, whose steps are equally large everywhere, fills it with noise that no spectrogram
holds. Behind a filter, the same steps move whole regions, and fewer of them are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

NEGLIGIBLE = 1e-2
"""Weight, relative to the first, below which the filter's taps are cut off."""


@dataclass(frozen=True)
class Latent:
    """A tensor that is free, or white noise behind one first-order autoregressive filter per axis.

    Attributes:
        noise: What to optimise, of the input's shape.
        axes: The axes to filter along.
        correlation: Of neighbours along these axes, 0 <= correlation < 1.
        normalized: The axis along which the input has mean 0 and deviation 1, as a front end
            leaves it; None for no such axis.
        gain, offset: What the filtered noise is multiplied with, and what is added then.
        padding: An axis, and where on it the padding begins: the least value from there on, which
            is silence to a log-mel front end; None for no padding.
    """

    noise: Tensor
    axes: tuple[int, ...] = ()
    correlation: float = 0.0
    normalized: int | None = None
    gain: float | Tensor = 1.0
    offset: float | Tensor = 0.0
    padding: tuple[int, int] | None = None

    def value(self) -> Tensor:
        """The input, of deviation `gain` if the noise has 1; differentiable in the noise."""
        x = self.noise
        for axis in self.axes:
            x = _filter(x, axis, taps(self.correlation).to(x))
        if self.normalized is not None:
            variance, mean = torch.var_mean(x, dim=self.normalized, keepdim=True)
            x = (x - mean) / variance.sqrt()
        if isinstance(self.gain, Tensor) or (self.gain, self.offset) != (1.0, 0.0):
            x = x * self.gain + self.offset
        return x if self.padding is None else _pad(x, *self.padding)


def uniform(shape: Sequence[int], spread: float, generator: torch.Generator) -> Latent:
    """Independent values from U[-spread, spread], float32."""
    return Latent((torch.rand(tuple(shape), generator=generator) * 2 - 1) * spread)


def correlated(
    shape: Sequence[int],
    correlation: float,
    generator: torch.Generator,
    normalized: int | None = None,
) -> Latent:
    """Standard normal values, float32, correlated along all axes but the first.

    The covariance is correlation^distance along each of them, but for the cut-off taps.
    `normalized` is `Latent`'s.
    """
    axes = tuple(range(1, len(shape)))
    noise = torch.randn(tuple(shape), generator=generator)
    return Latent(noise, axes, correlation, normalized)


def taps(correlation: float) -> Tensor:
    """The impulse response of a first-order autoregressive filter, of norm 1: float32 [taps]."""
    count = 1 + math.ceil(math.log(NEGLIGIBLE) / math.log(correlation)) if correlation else 1
    exponents = torch.arange(count, dtype=torch.float64)
    response = torch.full_like(exponents, correlation).pow(exponents)
    return response.div(response.norm()).float()


def _pad(x: Tensor, axis: int, start: int) -> Tensor:
    kept = x.narrow(axis, 0, start)
    shape = list(x.shape)
    shape[axis] -= start
    return torch.cat([kept, kept.detach().amin().expand(shape)], dim=axis)


def _filter(x: Tensor, axis: int, response: Tensor) -> Tensor:
    """Filter along `axis`; the first value stands for all before it, so that no variance is lost.

    It is the Cholesky factor of the values' covariance that is multiplied with, in other words.
    """
    moved = x.movedim(axis, -1)
    first, rest = moved[..., :1] / response[0], moved[..., 1:]
    rows = torch.cat([first, rest], dim=-1).reshape(-1, 1, moved.shape[-1])
    y = F.conv1d(F.pad(rows, (len(response) - 1, 0)), response.flip(0).reshape(1, 1, -1))
    filtered: Tensor = y.reshape(moved.shape).movedim(-1, axis)
    return filtered
