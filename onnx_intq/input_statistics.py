"""What a model's first BatchNorm says of its input: mean and deviation of every feature.

Where no front end is recorded, features may have any scale: a cepstral coefficient a mean of -300
and a deviation of 200, the next ones 40 and 60. Behind a convolution w over a stationary input,
BatchNorm's mean is linear in the features' means m, and its variance in their variances v if they
are uncorrelated, with a correlation r of neighbouring frames:
mean[o] = b[o] + sum w[o, c, k] m[c], variance[o] = sum w[o, c, k] w[o, c, l] r^|k-l| v[c].
There are more output channels than features, so both can be solved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import torch

from onnx_intq.graph import constant, sole_consumer
from onnx_intq.latent import Latent

STRETCH = 1.5
"""What is made to have a deviation reaches as far as a Gaussian; features have longer tails: pauses
between words, with decibels far below speech. On MatchboxNet, made data reaches as far as real data
with this factor, and logits are 20 to 28 dB from float's instead of 15."""
ROUNDS = 20
"""Of the search for variances: more of them fit noise in the weakest features."""
DIMENSIONS = 3
"""Of a weight of a convolution over time: output channels, features, taps."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Of the features of an input: float64 [features]."""

    mean: Floats
    deviation: Floats

    def start(self, latent: Latent) -> Latent:
        """Noise [batch, features, time] that has them; its features do not depend on each other."""
        shape = (1, -1, 1)
        offset, gain = (
            torch.tensor(values, dtype=torch.float32, device=latent.noise.device).reshape(shape)
            for values in (self.mean, self.deviation)
        )
        return replace(latent, axes=(2,), gain=gain, offset=offset)


def stretched(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Features [batch, features, time], `STRETCH` times as far from their means."""
    mean = values.mean(axis=(0, 2), keepdims=True)
    found: npt.NDArray[np.float32] = (mean + STRETCH * (values - mean)).astype(np.float32)
    return found


def input_statistics(graph: gs.Graph, name: str, correlation: float) -> Statistics | None:
    """The statistics of input `name` [batch, features, time].

    Args:
        graph: Not changed.
        name: Of the input.
        correlation: Of neighbouring frames.

    Returns:
        None where the input is not read by one Conv over all features, with a BatchNormalization
        behind it and constant weights, or where there are fewer channels than features.
    """
    conv = next((t for t in graph.inputs if t.name == name), None)
    layer = None if conv is None else sole_consumer(graph, conv)
    if layer is None or layer.op != "Conv":
        return None
    norm, w = sole_consumer(graph, layer.outputs[0]), constant(layer, 1)
    if norm is None or norm.op != "BatchNormalization" or w is None:
        return None
    mean, variance = constant(norm, 3), constant(norm, 4)
    grouped = layer.attrs.get("group", 1) != 1
    if mean is None or variance is None or w.ndim != DIMENSIONS or grouped or len(w) < w.shape[1]:
        return None
    bias = constant(layer, 2)
    distance = layer.attrs.get("dilations", [1])[0]
    return _solve(w, mean - (0 if bias is None else bias), variance, correlation**distance)


def _solve(w: npt.NDArray[Any], mean: Floats, variance: Floats, correlation: float) -> Statistics:
    w = w.astype(np.float64)
    means = np.linalg.lstsq(w.sum(axis=2), mean.astype(np.float64), rcond=None)[0]
    taps = np.arange(w.shape[2])
    alike = correlation ** np.abs(np.subtract.outer(taps, taps))
    shares = np.einsum("ock,kl,ocl->oc", w, alike, w)
    return Statistics(mean=means, deviation=np.sqrt(_nonnegative(shares, variance)))


def _nonnegative(shares: Floats, variance: Floats) -> Floats:
    """The x >= 0 with shares @ x near `variance`, in proportion: multiplicative updates.

    Source: Fevotte, Bertin and Durrieu, "Nonnegative Matrix Factorization with the Itakura-Saito
    Divergence", Neural Computation 2009, section 2.3.

    Args:
        shares: [channels, features], not negative.
        variance: [channels].
    """
    tiny = np.finfo(np.float64).tiny
    total = shares.sum(axis=1) + tiny
    x = np.full(shares.shape[1], np.exp(np.log((variance + tiny) / total).mean()))
    for _ in range(ROUNDS):
        weighted = shares / (shares @ x + tiny)[:, None]
        x *= (weighted.T @ (variance / (shares @ x + tiny))) / (weighted.sum(axis=0) + tiny)
    return x
