"""The weights of a network while they are trained to be quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from onnx_intq.codebook import CodedWeight, code
from onnx_intq.schemes import quantizer
from onnx_intq.training_network import TrainedNetwork
from onnx_intq.weight_quantizer import WeightQuantizer

RATES = {"latent": 2.5, "theta": 0.3}
"""Learning rates by kind of parameter, as factors; others have 1.

`latent` counts 2^(8 - bits) steps of int8, about the gap between two centroids; biases count their
tensor's root mean square.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class HardWeights:
    """What a network of quantized weights consists of at some step.

    Attributes:
        coded: The quantized weights, by key.
        biases: float32, by key.
    """

    coded: Mapping[str, CodedWeight]
    biases: Mapping[str, npt.NDArray[np.float32]]

    def values(self, device: str) -> dict[str, Tensor]:
        """The real weights and biases, as tensors."""
        real = {key: coded.dequantized() for key, coded in self.coded.items()}
        return {
            k: torch.from_numpy(np.array(v)).to(device) for k, v in {**real, **self.biases}.items()
        }


class QuantizedWeights:
    """A quantizer per weight, and the biases.

    Attributes:
        quantizers: By key.
        biases: By key, in units of each one's root mean square.
    """

    def __init__(self, network: TrainedNetwork, scheme: str, bits: Mapping[str, int]) -> None:
        """Make the quantizers.

        Args:
            network: Its float weights are where training starts.
            scheme: One of `schemes.SCHEMES`.
            bits: Width of each weight, by key; weights that are missing stay as they are.
        """
        self.quantizers: dict[str, WeightQuantizer] = {}
        for key, width in bits.items():
            site = network.weights[key].site
            made = quantizer(scheme, site.constant.values, site.axis, width)
            self.quantizers[key] = made.to(network.device)
        self._units = {k: float(v.square().mean().sqrt()) or 1.0 for k, v in network.biases.items()}
        self.biases = {k: nn.Parameter(v / self._units[k]) for k, v in network.biases.items()}
        self._roundings: dict[str, Tensor] = {}

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by names that say the weight and the kind."""
        found = {f"biases:{key}": bias for key, bias in self.biases.items()}
        for key, made in self.quantizers.items():
            named = made.named_parameters()
            found |= {f"{kind}:{key}": tensor for kind, tensor in named if tensor.requires_grad}
        return found

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, one per kind, each with its learning rate."""
        kinds: dict[tuple[str, int], list[nn.Parameter]] = {}
        for name, tensor in self.parameters().items():
            kind, _, key = name.partition(":")
            gap = 1 << (8 - self.quantizers[key].bits) if kind == "latent" else 1
            kinds.setdefault((kind, gap), []).append(tensor)
        return [
            {"params": tensors, "lr": rate * RATES.get(kind, 1.0) * gap, "kind": kind}
            for (kind, gap), tensors in sorted(kinds.items())
        ]

    def values(self, progress: float, *, quantize: bool = True) -> dict[str, Tensor]:
        """The weights and biases of a training step, differentiable.

        Args:
            progress: Share of the training that is done, 0..1.
            quantize: Whether to quantize the weights now; if not, what that changed last time is
                added to them as they are.
        """
        found = self._real_biases()
        for key, made in self.quantizers.items():
            rounding = self._roundings.get(key)
            if quantize or rounding is None:
                found[key] = made(progress)
            else:
                found[key] = made.latent * made.log_scale.exp() + rounding
        return found

    def keep_roundings(self, values: Mapping[str, Tensor]) -> None:
        """Remember what quantization changed, for `values(quantize=False)`."""
        with torch.no_grad():
            for key, made in self.quantizers.items():
                self._roundings[key] = values[key] - made.latent * made.log_scale.exp()

    def penalty(self) -> Tensor | None:
        """The mean of the quantizers' regularizers; None without."""
        found = [p for made in self.quantizers.values() if (p := made.penalty()) is not None]
        return torch.stack(found).mean() if found else None

    def after_step(self, progress: float) -> None:
        """What the quantizers do after each step of the optimizer."""
        for made in self.quantizers.values():
            made.after_step(progress)

    def hard(self) -> HardWeights:
        """The weights as they would be stored now; a copy."""
        return HardWeights(
            coded={key: made.coded() for key, made in self.quantizers.items()},
            biases={k: b.detach().cpu().numpy() for k, b in self._real_biases().items()},
        )

    def _real_biases(self) -> dict[str, Tensor]:
        return {key: bias * self._units[key] for key, bias in self.biases.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything training changes but the optimizer, as tensors."""
        found = {f"biases:{key}": bias.detach() for key, bias in self.biases.items()}
        for key, made in self.quantizers.items():
            found |= {f"{kind}:{key}": tensor for kind, tensor in made.state_dict().items()}
        return found | {f"roundings:{key}": r for key, r in self._roundings.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        by_key: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            kind, _, key = name.partition(":")
            by_key.setdefault(key, {})[kind] = tensor
        with torch.no_grad():
            for key, bias in self.biases.items():
                bias.copy_(by_key[key].pop("biases"))
            for key, made in self.quantizers.items():
                if (rounding := by_key[key].pop("roundings", None)) is not None:
                    self._roundings[key] = rounding.to(made.latent.device)
                made.load_state_dict(by_key[key])


def untrained(network: TrainedNetwork, bits: Mapping[str, int]) -> HardWeights:
    """Uniform weights of least squared error, without training."""
    sites = {key: network.weights[key].site for key in bits}
    return HardWeights(
        coded={k: code(s.constant.values, s.axis, bits[k], "uniform") for k, s in sites.items()},
        biases={key: bias.cpu().numpy() for key, bias in network.biases.items()},
    )
