"""How varied the tokens of a transformer are: the objective where no BatchNorm holds statistics.

PSAQ-ViT (arXiv 2203.02250, section 3.2): real input makes the outputs of attention differ from
token to token, noise does not. The density of the cosine similarities between tokens is estimated
with Gaussian kernels, and its differential entropy should be large in every attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnx_intq.composites import attention

TOKENS = 128
"""Tokens compared with one another, evenly spaced: 8,128 pairs."""
POINTS = 32
"""At which a density is evaluated."""
NARROWEST = 1e-3
"""Added to a kernel's width, so that equal tokens have a finite entropy."""


@dataclass(frozen=True)
class Attention:
    """Weights times values: the node's name, and the tensor it makes."""

    name: str
    tap: str


@dataclass(frozen=True)
class Entropies:
    """The objective of method "entropy": minus the entropy of similarities per attention, nats."""

    attentions: list[Attention]
    measure = "negative_entropy"

    @property
    def names(self) -> list[str]:
        """Of the attentions."""
        return [attention.name for attention in self.attentions]

    @property
    def taps(self) -> list[str]:
        """The tensors to look at."""
        return [attention.tap for attention in self.attentions]

    def parts(self, values: Mapping[str, Tensor]) -> Tensor:
        """Minus the entropy of each, float32 [attentions]."""
        return torch.stack([-similarity_entropy(values[tap]) for tap in self.taps])


def attentions(graph: gs.Graph) -> list[Attention]:
    """The products of a Softmax and its values, in graph order."""
    products = (node for node in graph.nodes if node.op == "MatMul")
    return [Attention(n.name, n.outputs[0].name) for n in products if attention(n) is not None]


def similarity_entropy(x: Tensor) -> Tensor:
    """Differential entropy of the cosine similarities between tokens, averaged over samples, nats.

    Args:
        x: What attention makes, [..., tokens, channels]; if there are two axes before, the second
            is that of the heads, which are averaged.
    """
    x = x.mean(1) if x.ndim == 4 else x
    x = x.reshape(-1, *x.shape[-2:])
    count = min(TOKENS, x.shape[1])
    index = torch.linspace(0, x.shape[1] - 1, count).long()
    unit = F.normalize(x[:, index], dim=-1)
    first, second = torch.triu_indices(count, count, 1)
    return entropy((unit @ unit.transpose(1, 2))[:, first, second]).mean()


def entropy(values: Tensor) -> Tensor:
    """Differential entropy of the kernel density estimate of each row, nats.

    The kernels are Gaussian, their width by Silverman's rule.

    Args:
        values: float32 [rows, values].

    Returns:
        float32 [rows].
    """
    deviation = values.var(1, correction=0, keepdim=True).add(NARROWEST**2).sqrt()
    width = 1.06 * deviation * values.shape[1] ** -0.2 + NARROWEST
    with torch.no_grad():
        low = values.amin(1, keepdim=True) - 3 * width
        high = values.amax(1, keepdim=True) + 3 * width
        points = low + (high - low) * torch.linspace(0, 1, POINTS, device=values.device)
        step = (high - low)[:, 0] / (POINTS - 1)
    apart = (values[:, None] - points[..., None]) / width[..., None]
    density = torch.exp(-0.5 * apart.square()).mean(-1) / (math.sqrt(2 * math.pi) * width)
    found: Tensor = -torch.xlogy(density, density + 1e-12).sum(1) * step
    return found


def fit_scale(cost: Callable[[float, float], float]) -> tuple[float, float]:
    """The gain and offset of the input that cost least.

    A front end's own normalisation is not in an ONNX file, but a network tells tokens apart best
    at the scale it was trained at: weaker input drowns in the biases, stronger saturates. Gains are
    tried octave by octave at offset 0, then offsets, then gains and offsets near by.

    Args:
        cost: Of a gain and an offset, such as the mean of `Entropies.parts`.

    Returns:
        Gain in 2^-5 ... 2^4, and the offset.
    """
    seen: dict[tuple[float, float], float] = {}

    def best(candidates: list[tuple[float, float]]) -> tuple[float, float]:
        for pair in candidates:
            if pair not in seen:
                seen[pair] = cost(*pair)
        return min(seen, key=lambda pair: seen[pair])

    gain, _ = best([(2.0**k, 0.0) for k in range(-4, 4)])
    gain, offset = best([(gain, gain * k) for k in (-4, -2, -1, 1, 2, 4)])
    gain, offset = best([(gain * 2.0**k, offset) for k in (-1, -0.5, 0.5, 1)])
    return best([(gain, offset + gain * k) for k in (-0.5, 0.5)])
