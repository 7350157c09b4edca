"""Convolutions that shorten a Conformer's input, as NeMo's ConvSubsampling with its names.

`striding`: Gulati et al., "Conformer", Interspeech 2020, section 2; `vggnet`: blocks of two
convolutions and a pooling, Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onnx_intq.models.copied_dimensions import reshape

Mask = Tensor | None
"""Bool [batch, 1, time], true where there is speech; None where all frames are."""


class Subsampling(nn.Module):
    """Convolutions over time and frequency, each stage of which halves both, and a linear layer.

    `factor` is the product of the strides: a power of two.
    """

    def __init__(self, kind: str, factor: int, features: int, channels: int, width: int) -> None:
        super().__init__()
        stages = factor.bit_length() - 1
        stage = STAGES[kind]
        layers: list[nn.Module] = []
        for number in range(stages):
            layers += stage(channels if number else 1, channels)
        self.conv = nn.ModuleList(layers)
        self.out = nn.Linear(channels * -(-features // factor), width)

    def forward(self, signal: Tensor, mask: Mask) -> tuple[Tensor, Mask]:
        """Map [batch, features, time] to [batch, time', width]; return the mask beside it."""
        hidden = signal.transpose(1, 2).unsqueeze(1)
        for layer in self.conv:
            hidden, mask = _run(layer, hidden, mask)
        joined = reshape(hidden.transpose(1, 2), 0, -1, self.out.in_features)
        return self.out(joined), mask


def striding(inputs: int, channels: int) -> list[nn.Module]:
    """One convolution with stride 2."""
    return [nn.Conv2d(inputs, channels, 3, stride=2, padding=1), nn.ReLU()]


def vgg(inputs: int, channels: int) -> list[nn.Module]:
    """Two convolutions and the maximum of pairs."""
    first = nn.Conv2d(inputs, channels, 3, padding=1)
    second = nn.Conv2d(channels, channels, 3, padding=1)
    return [first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]


STAGES = {"striding": striding, "vggnet": vgg}
"""What halves time and frequency, by NeMo's names."""


def _run(layer: nn.Module, hidden: Tensor, mask: Mask) -> tuple[Tensor, Mask]:
    """Run a layer on [batch, channels, time, frequency], with zeros where there is no speech."""
    if mask is None or isinstance(layer, nn.ReLU):
        return layer(hidden), mask
    # Before a pooling too: it follows a ReLU, so that a zero never is the larger one of a pair.
    result = layer(torch.where(mask.unsqueeze(3), hidden, 0.0))
    halved = layer.stride in {2, (2, 2)}
    # Frame t of the result stands for the pair that begins at 2t: valid if and only if that is.
    return result, mask[:, :, ::2] if halved else mask
