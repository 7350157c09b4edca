"""Conformer-CTC acoustic models with NeMo's structure and parameter names.

Gulati et al., "Conformer: Convolution-augmented Transformer for Speech Recognition", Interspeech
2020, section 2 and table 1, with a linear CTC decoder; names as in NeMo's `ConformerEncoder` and
`ConvASRDecoder`, so that its checkpoints load with `load_state_dict`.

Law: with `length` given, a padded batch yields for each utterance what it yields alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from onnx_intq.frontend import Frontend
from onnx_intq.models.conformer_block import ConformerBlock, ConformerBlockConfig
from onnx_intq.models.ctc_model import CtcModel, Decoder
from onnx_intq.models.quartznet import ENGLISH
from onnx_intq.models.relative_attention import RelativePositions
from onnx_intq.models.subsampling import STAGES, Subsampling
from onnx_intq.transform import IntqError


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """A whole network: mel features in, `len(labels) + 1` classes out (the blank comes last).

    Attributes:
        block: Sizes of each block.
        layers: How many blocks there are.
        labels: Characters or SentencePiece pieces, without the blank.
        features: Mel bands.
        subsampling: One of `subsampling.STAGES`.
        factor: Input frames per frame of the blocks; a power of two.
        channels: Of the sub-sampling's convolutions; None for the block's width.
        scaled: Whether the sub-sampling's result is multiplied by the root of the width.
        longest: Most frames of the blocks that there are positions for.
        input_dropout: Of the sub-sampling's result.
        position_dropout: Of the positions' encoding.

    Raises:
        IntqError: A size is out of range or a name is unknown.
    """

    block: ConformerBlockConfig
    layers: int
    labels: tuple[str, ...] = ENGLISH
    features: int = 80
    subsampling: str = "striding"
    factor: int = 4
    channels: int | None = None
    scaled: bool = True
    longest: int = 5000
    input_dropout: float = 0.1
    position_dropout: float = 0.0

    def __post_init__(self) -> None:
        channels = 1 if self.channels is None else self.channels
        if not self.labels or min(self.layers, self.features, channels, self.longest) < 1:
            raise IntqError(
                "a Conformer needs labels, layers, features, channels and positions; one is empty"
            )
        if self.subsampling not in STAGES:
            raise IntqError(
                f"unknown sub-sampling {self.subsampling!r}; expected one of: {', '.join(STAGES)}"
            )
        if self.factor < 2 or self.factor & (self.factor - 1):
            raise IntqError(f"sub-sampling factor is {self.factor}; expected a power of two")
        if not (0 <= self.input_dropout < 1 and 0 <= self.position_dropout < 1):
            raise IntqError("dropout must lie in [0, 1); correct the configuration")


FRONTEND = Frontend(features=80, window_size=0.025, n_fft=512)
"""The front end of NeMo's published models."""
SIZES = {"small": (176, 4, 16), "medium": (256, 4, 18), "large": (512, 8, 18)}
"""Width, heads and layers of NeMo's published models."""


def conformer_config(size: str) -> ConformerConfig:
    """The published network of a size in `SIZES`, with characters as labels."""
    width, heads, layers = SIZES[size]
    return ConformerConfig(block=ConformerBlockConfig(width=width, heads=heads), layers=layers)


class ConformerEncoder(nn.Module):
    """NeMo's ConformerEncoder: sub-sampling, then the blocks in a row."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        width = config.block.width
        channels = config.channels or width
        self.pre_encode = Subsampling(
            config.subsampling, config.factor, config.features, channels, width
        )
        self.scale = width**0.5 if config.scaled else None
        self.pos_enc = RelativePositions(width, config.longest)
        self.dropout = nn.Dropout(config.input_dropout)
        self.position_dropout = nn.Dropout(config.position_dropout)
        self.layers = nn.ModuleList(ConformerBlock(config.block) for _ in range(config.layers))

    def forward(self, signal: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Map features [batch, mels, time] to [batch, width, time']; return the mask beside it."""
        hidden, mask = self.pre_encode(signal, mask)
        if self.scale is not None:
            hidden = hidden * self.scale
        positions = self.pos_enc(hidden, mask, self.position_dropout)
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, positions, mask)
        return hidden.transpose(1, 2), mask


class Conformer(CtcModel):
    """A network built from its configuration, with PyTorch's initial weights."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ConformerEncoder(config)
        self.decoder = Decoder(config.block.width, len(config.labels) + 1)
