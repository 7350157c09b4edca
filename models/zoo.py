"""Models by name: the published QuartzNets, untrained, and the trained ones that are shipped."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from onnx_intq.frontend import Frontend
from onnx_intq.models.nemo import NemoModel, read_nemo
from onnx_intq.models.quartznet import QuartzNet, QuartzNetConfig, quartznet_config
from onnx_intq.transform import IntqError

PUBLISHED = {"quartznet5x5": 1, "quartznet10x5": 2, "quartznet15x5": 3}
"""Name -> how often each of the five blocks stands in a row."""
PRETRAINED = Path(__file__).parent / "pretrained"
SEED = 0
"""Seed of the untrained weights."""
NORM_BIAS = 1.0
"""BatchNorm's bias in untrained networks, in standard deviations of what it gives."""
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
        network = untrained(quartznet_config(PUBLISHED[name]), seed=SEED)
        return NemoModel(network=network, frontend=Frontend())
    if name in zoo_names():
        return read_nemo(PRETRAINED / f"{name}.nemo")
    known = ", ".join(zoo_names())
    raise IntqError(f"unknown model {name!r}; expected FILE.nemo or one of: {known}")


def untrained(config: QuartzNetConfig, *, seed: int) -> QuartzNet:
    """Build a network with random weights that behaves numerically like a trained one.

    NeMo's initialisation is a start for training only. Its statistics of mean 0 and variance 1 let
    the signal die out within a few blocks: here they are those of white noise. And a ReLU after a
    centred BatchNorm makes any error grow by a fifth per layer (Yang et al., "A Mean Field Theory
    of Batch Normalization", ICLR 2019), so that in 15x5 float32 rounding reaches the second
    decimal: here `NORM_BIAS` keeps most units in the ReLU's linear part.

    The global random generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = QuartzNet(config).double()
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]
        for norm in norms:
            norm.bias.fill_(NORM_BIAS)
        momentum = norms[0].momentum
        _set_momentum(norms, 1.0)
        batch, frames = SETTLING
        # In float64, so that the order of summation (threads, CPU) does not reach float32.
        network.train()(torch.randn(batch, config.features, frames, dtype=torch.float64))
        _set_momentum(norms, momentum)
    return network.float().eval()


def _set_momentum(norms: list[nn.BatchNorm1d], momentum: float | None) -> None:
    for norm in norms:
        norm.momentum = momentum
