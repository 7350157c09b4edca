"""How far a BatchNorm's input is from what the BatchNorm saw in training (Q-ASR section 2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnx_intq.graph import constant


@dataclass(frozen=True)
class Norm:
    """A BatchNormalization's running statistics, and where its input is found.

    Attributes:
        name: Of the node.
        tap: Name of the tensor it reads.
        mean, variance: float32 [channels]; the variance includes the node's epsilon, so that dead
            channels (variance 0) weigh no more than others.
        epsilon: Added to the variance of the synthetic batch too.
    """

    name: str
    tap: str
    mean: Tensor
    variance: Tensor
    epsilon: float


@dataclass(frozen=True)
class Divergences:
    """The objective of methods "kl" and "qasr": KL divergence per BatchNorm, nats per channel."""

    norms: list[Norm]
    measure = "divergence"

    @property
    def names(self) -> list[str]:
        """Of the BatchNorms."""
        return [norm.name for norm in self.norms]

    @property
    def taps(self) -> list[str]:
        """The tensors to look at."""
        return [norm.tap for norm in self.norms]

    def parts(self, values: Mapping[str, Tensor]) -> Tensor:
        """The divergence of each, float32 [norms]."""
        return torch.stack([divergence(values[norm.tap], norm) for norm in self.norms])


def batch_norms(graph: gs.Graph, device: str = "cpu") -> list[Norm]:
    """The BatchNormalization nodes whose statistics are constant, in graph order."""
    found = []
    for node in graph.nodes:
        mean, variance = constant(node, 3), constant(node, 4)
        if node.op != "BatchNormalization" or mean is None or variance is None:
            continue
        epsilon = float(node.attrs.get("epsilon", 1e-5))
        statistics = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, variance))
        mu, var = statistics
        found.append(Norm(node.name, node.inputs[0].name, mu, var + epsilon, epsilon))
    return found


def divergence(x: Tensor, norm: Norm) -> Tensor:
    """KL divergence of the Gaussian of `x` from that of `norm`, averaged over channels, in nats.

    Args:
        x: The BatchNorm's input [batch, channels, ...].
        norm: What it should look like.
    """
    rows = x.transpose(1, -1).flatten(0, -2)  # channels last, as TorchGraph keeps them: no copy
    mean = rows.mean(0)
    variance = (rows - mean).square().mean(0) + norm.epsilon
    apart = (norm.variance + (norm.mean - mean).square()) / variance
    return 0.5 * (torch.log(variance / norm.variance) - 1 + apart).mean()
