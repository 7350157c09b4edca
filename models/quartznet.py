"""QuartzNet and Jasper acoustic models with NeMo's structure and parameter names.

Kriman et al., "QuartzNet: Deep Automatic Speech Recognition with 1D Time-Channel Separable
Convolutions", ICASSP 2020, section 2 and table 1; names as in NeMo's `ConvASREncoder` and
`ConvASRDecoder`, so that its checkpoints load with `load_state_dict`.

Law: with `length` given, a padded batch yields for each utterance what it yields alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import dropwhile

from torch import Tensor, nn

from onnx_intq.models.ctc_model import CtcModel, Decoder
from onnx_intq.models.jasper_block import BlockConfig, JasperBlock
from onnx_intq.transform import IntqError

ENGLISH = (" ", *"abcdefghijklmnopqrstuvwxyz", "'")
"""NeMo's character labels for English; the blank comes last and is not among them."""
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "hardtanh": lambda: nn.Hardtanh(0.0, 20.0),
    "selu": nn.SELU,
    "swish": nn.SiLU,
    "silu": nn.SiLU,
}
"""Names as in NeMo's `encoder.activation`."""


@dataclass(frozen=True, kw_only=True)
class QuartzNetConfig:
    """A whole network: mel features in, `len(labels) + 1` classes out (the blank comes last).

    Raises:
        IntqError: A part is empty, the activation unknown, or dense blocks are not in one row.
    """

    blocks: tuple[BlockConfig, ...]
    labels: tuple[str, ...] = ENGLISH
    features: int = 64
    activation: str = "relu"

    def __post_init__(self) -> None:
        if not (self.blocks and self.labels and self.features >= 1):
            raise IntqError("a QuartzNet needs blocks, labels and features; one of them is empty")
        if self.activation not in ACTIVATIONS:
            raise IntqError(
                f"unknown activation {self.activation!r}; expected one of: {', '.join(ACTIVATIONS)}"
            )
        behind = dropwhile(lambda block: not block.residual_dense, self.blocks)
        if any(block.residual for block in dropwhile(lambda block: block.residual_dense, behind)):
            raise IntqError(
                "a residual block stands behind those with residual_dense; expected them in one "
                "row and the last to be residual; correct the configuration"
            )


def quartznet_config(repeats: int) -> QuartzNetConfig:
    """The published network with each of its five blocks `repeats` times: 5x5, 10x5, 15x5."""
    widths = ((256, 33), (256, 39), (512, 51), (512, 63), (512, 75))
    body = [
        BlockConfig(filters=filters, kernel=kernel, repeat=5, residual=True, separable=True)
        for filters, kernel in widths
        for _ in range(repeats)
    ]
    first = BlockConfig(filters=256, kernel=33, stride=2, separable=True)
    wide = BlockConfig(filters=512, kernel=87, dilation=2, separable=True)
    last = BlockConfig(filters=1024, kernel=1)
    return QuartzNetConfig(blocks=(first, *body, wide, last))


class Encoder(nn.Module):
    """NeMo's ConvASREncoder: the blocks in a row, dense ones also fed the inputs of all before."""

    def __init__(self, config: QuartzNetConfig) -> None:
        super().__init__()
        self.dense = tuple(block.residual_dense for block in config.blocks)
        activation = ACTIVATIONS[config.activation]
        self.encoder = nn.ModuleList()
        channels, earlier = config.features, list[int]()
        for block in config.blocks:
            used = earlier if block.residual_dense else []
            self.encoder.append(JasperBlock(channels, block, activation, earlier=used))
            earlier += [channels] if block.residual_dense else []
            channels = block.filters

    def forward(self, signal: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Map features [batch, mels, time] to [batch, filters, time']."""
        earlier = list[Tensor]()
        for block, dense in zip(self.encoder, self.dense, strict=True):
            result, mask = block(signal, mask, earlier if dense else [])
            earlier += [signal] if dense else []
            signal = result
        return signal, mask


class QuartzNet(CtcModel):
    """A network built from its configuration, initialised as NeMo does (Xavier uniform)."""

    encoder: Encoder

    def __init__(self, config: QuartzNetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config.blocks[-1].filters, len(config.labels) + 1)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.xavier_uniform_(module.weight)
