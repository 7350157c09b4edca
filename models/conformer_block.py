"""One block of a Conformer: two half feed-forwards around attention and convolution.

Gulati et al., "Conformer: Convolution-augmented Transformer for Speech Recognition", Interspeech
2020, section 2.1 to 2.4; names as in NeMo's ConformerLayer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from onnx_intq.models.relative_attention import Positions, RelativeAttention
from onnx_intq.transform import IntqError


@dataclass(frozen=True, kw_only=True)
class ConformerBlockConfig:
    """Sizes of a block.

    Attributes:
        width: Numbers per frame.
        heads: Of the attention; they share the width.
        kernel: Of the depthwise convolution, frames; odd.
        expansion: Width of the feed-forwards' hidden layer, in widths.
        dropout: Of the feed-forwards and of each module's result.
        attention_dropout: Of the attention's weights.

    Raises:
        IntqError: A size is out of range.
    """

    width: int
    heads: int
    kernel: int = 31
    expansion: int = 4
    dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.kernel, self.expansion) < 1:
            raise IntqError(f"{self}: sizes must be at least 1; correct the configuration")
        if self.width % self.heads or self.width % 2:
            raise IntqError(
                f"{self}: the width must be even, for sines and cosines, and a multiple of the "
                "heads; correct it"
            )
        if self.kernel % 2 == 0:
            raise IntqError(f"{self}: an even kernel cannot be centred; expected an odd one")
        if not (0 <= self.dropout < 1 and 0 <= self.attention_dropout < 1):
            raise IntqError(f"{self}: dropout must lie in [0, 1); correct the configuration")


class ConformerBlock(nn.Module):
    """Feed-forward, attention, convolution, feed-forward, each added to what it gets."""

    def __init__(self, config: ConformerBlockConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_feed_forward1 = nn.LayerNorm(width)
        self.feed_forward1 = FeedForward(config)
        self.norm_conv = nn.LayerNorm(width)
        self.conv = ConvolutionModule(width, config.kernel)
        self.norm_self_att = nn.LayerNorm(width)
        self.self_attn = RelativeAttention(width, config.heads, config.attention_dropout)
        self.norm_feed_forward2 = nn.LayerNorm(width)
        self.feed_forward2 = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, hidden: Tensor, positions: Positions, mask: Tensor | None) -> Tensor:
        """Map [batch, frames, width] to the same shape; the mask is bool [batch, 1, frames]."""
        drop = self.dropout
        hidden = hidden + drop(self.feed_forward1(self.norm_feed_forward1(hidden))) * 0.5
        hidden = hidden + drop(self.self_attn(self.norm_self_att(hidden), positions))
        hidden = hidden + drop(self.conv(self.norm_conv(hidden), mask))
        hidden = hidden + drop(self.feed_forward2(self.norm_feed_forward2(hidden))) * 0.5
        out: Tensor = self.norm_out(hidden)
        return out


class FeedForward(nn.Module):
    """Two linear layers with a Swish between them."""

    def __init__(self, config: ConformerBlockConfig) -> None:
        super().__init__()
        inner = config.width * config.expansion
        self.linear1 = nn.Linear(config.width, inner)
        self.activation = nn.SiLU()
        self.dropout = nn.Dropout(config.dropout)
        self.linear2 = nn.Linear(inner, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., width] to the same shape."""
        out: Tensor = self.linear2(self.dropout(self.activation(self.linear1(hidden))))
        return out


class ConvolutionModule(nn.Module):
    """Pointwise convolution with a gate, depthwise convolution, BatchNorm, Swish, pointwise."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1)
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.activation = nn.SiLU()
        self.pointwise_conv2 = nn.Conv1d(width, width, 1)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Map [batch, frames, width] to the same shape; frames beyond the mask count as zeros."""
        signal = functional.glu(self.pointwise_conv1(hidden.transpose(1, 2)), dim=1)
        if mask is not None:
            signal = torch.where(mask, signal, 0.0)
        signal = self.activation(self.batch_norm(self.depthwise_conv(signal)))
        out: Tensor = self.pointwise_conv2(signal).transpose(1, 2)
        return out
