"""Models by name: the published networks, untrained, and the trained ones that are shipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import torch
from torch import nn

from onnx_intq.frontend import Frontend
from onnx_intq.models import conformer
from onnx_intq.models.conformer import Conformer, ConformerConfig, conformer_config
from onnx_intq.models.jasper import jasper_config
from onnx_intq.models.nemo import CtcNetwork, NemoModel, build_ctc, read_nemo
from onnx_intq.models.nemo_config import CtcConfig
from onnx_intq.models.quartznet import QuartzNet, QuartzNetConfig, quartznet_config
from onnx_intq.models.relative_attention import RelativeAttention
from onnx_intq.transform import IntqError

PUBLISHED: dict[str, CtcConfig] = {
    "quartznet5x5": quartznet_config(1),
    "quartznet10x5": quartznet_config(2),
    "quartznet15x5": quartznet_config(3),
    "jasper10x5dr": jasper_config(),
    "conformer-ctc-small": conformer_config("small"),
    "conformer-ctc-medium": conformer_config("medium"),
    "conformer-ctc-large": conformer_config("large"),
}
"""Name -> structure."""
PRETRAINED = Path(__file__).parent / "pretrained"
SEED = 0
"""Seed of the untrained weights."""
NORM_BIAS = 1.0
"""BatchNorm's bias in untrained networks, in standard deviations of what it gives."""
POSITION_BIAS = 0.5
"""Standard deviation of a Conformer's untrained position biases, about that of its queries."""
SETTLING = (4, 256)
"""Batch and frames of the noise that the untrained networks' BatchNorm statistics come from."""


def zoo_names() -> list[str]:
    """The names `zoo_model` knows, the published networks first."""
    return [*PUBLISHED, *sorted(file.stem for file in PRETRAINED.glob("*.nemo"))]


def zoo_model(name: str) -> NemoModel:
    """Build a model in evaluation mode; those of `PUBLISHED` have random weights of seed `SEED`.

    Raises:
        IntqError: There is no such model.
    """
    if name in PUBLISHED:
        config = PUBLISHED[name]
        frontend = conformer.FRONTEND if isinstance(config, ConformerConfig) else Frontend()
        return NemoModel(network=untrained(config, seed=SEED), frontend=frontend)
    if name in zoo_names():
        return read_nemo(PRETRAINED / f"{name}.nemo")
    known = ", ".join(zoo_names())
    raise IntqError(f"unknown model {name!r}; expected FILE.nemo or one of: {known}")


@overload
def untrained(config: QuartzNetConfig, *, seed: int) -> QuartzNet: ...
@overload
def untrained(config: ConformerConfig, *, seed: int) -> Conformer: ...
def untrained(config: CtcConfig, *, seed: int) -> CtcNetwork:
    """Build a network with random weights that behaves numerically like a trained one.

    NeMo's initialisation is a start for training only. Its statistics of mean 0 and variance 1 let
    the signal die out within a few blocks: here they are those of white noise. And a ReLU after a
    centred BatchNorm makes any error grow by a fifth per layer (Yang et al., "A Mean Field Theory
    of Batch Normalization", ICLR 2019), so that in 15x5 float32 rounding reaches the second
    decimal: here `NORM_BIAS` keeps most units in the ReLU's linear part. A Conformer's blocks
    normalise what they read; its position biases, which start at zero, are random here.

    The global random generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = build_ctc(config).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d) and isinstance(network, QuartzNet):
                module.bias.fill_(NORM_BIAS)
            if isinstance(module, RelativeAttention):
                module.pos_bias_u.normal_(std=POSITION_BIAS)
                module.pos_bias_v.normal_(std=POSITION_BIAS)
        batch, frames = SETTLING
        with _settling(network):
            network(torch.randn(batch, config.features, frames, dtype=torch.float64))
    return network


@contextmanager
def _settling(network: nn.Module) -> Iterator[None]:
    """While it lasts, BatchNorms take over the statistics of what they see.

    In float64, so that the order of summation (threads, CPU) does not reach float32; layer by
    layer, as all weights at once would take three times the memory.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]
    layers = [module for module in network.modules() if _holds_values(module)]
    hooks = [layer.register_forward_pre_hook(_widen) for layer in layers]
    hooks += [layer.register_forward_hook(_narrow) for layer in layers]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum


def _holds_values(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _widen(layer: nn.Module, _: object) -> None:
    layer.double()


def _narrow(layer: nn.Module, _: object, __: object) -> None:
    layer.float()
