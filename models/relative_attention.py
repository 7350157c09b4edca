"""Self-attention with relative positions, as NeMo's RelPositionMultiHeadAttention with its names.

Dai et al., "Transformer-XL", ACL 2019, section 3.3 and appendix B: a score is
(q + u) . k + (q + v) . p[distance]. Products with all distances are computed once per query; a
shift of the rows, which is a reshape, then brings them to their keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onnx_intq.models.copied_dimensions import reshape
from onnx_intq.transform import IntqError

MASKED = -10000.0
"""Score of a frame that is no speech, as in NeMo: the softmax makes it 0."""
PERIOD = 10000.0
"""Longest wavelength of the positions, over 2 pi."""


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What all layers share about the time axis.

    Attributes:
        encoding: float [1, 2 * frames, width], of the distances frames, frames - 1 ... 1 - frames.
        frames: The number of frames, int64 [1].
        shifted: int64 [4], the shape that `shift` gives its rows.
        keys: Bool [batch, 1, 1, frames], true for the keys to attend to; None for all.
    """

    encoding: Tensor
    frames: Tensor
    shifted: Tensor
    keys: Tensor | None


class RelativePositions(nn.Module):
    """The table of sines and cosines of all distances up to `longest`: a constant, no parameter."""

    table: Tensor

    def __init__(self, width: int, longest: int) -> None:
        super().__init__()
        self.longest = longest
        # In float32, step by step as NeMo does: the angles' rounding is then its rounding.
        distances = torch.arange(longest, -longest, -1, dtype=torch.float32).unsqueeze(1)
        rates = torch.exp(
            torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(PERIOD) / width)
        )
        angles = distances * rates
        table = torch.stack([torch.sin(angles), torch.cos(angles)], dim=2).flatten(1)
        self.register_buffer("table", table.unsqueeze(0), persistent=False)

    def forward(self, hidden: Tensor, mask: Tensor | None, dropout: nn.Module) -> Positions:
        """The positions of [batch, frames, width]; `mask` is bool [batch, 1, frames].

        Raises:
            IntqError: There are more frames than the table has.
        """
        frames = hidden.shape[1]
        if not torch.onnx.is_in_onnx_export() and frames > self.longest:
            raise IntqError(
                f"input has {frames} frames after sub-sampling; expected at most {self.longest}; "
                "cut it into shorter pieces"
            )
        count = torch._shape_as_tensor(hidden)[1:2]  # noqa: SLF001  one node, where shape[1] is four
        begin, end = self.longest - count, self.longest + count
        kept = torch.tensor([0])
        return Positions(
            encoding=dropout(self.table[:, begin:end]),
            frames=count,
            shifted=torch.cat([kept, kept, count, kept - 1]),
            keys=None if mask is None else mask.unsqueeze(1),
        )


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative positions."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, self.size))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, self.size))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        """Map [batch, frames, width] to the same shape."""
        # Scores are divided by the root here, where there are `size` numbers per frame and head;
        # the matrices of scores have one per pair of frames.
        scale = self.size**-0.5
        q = self._heads(self.linear_q(hidden) * scale)
        k = self._heads(self.linear_k(hidden)).permute(0, 2, 3, 1)
        v = self._heads(self.linear_v(hidden)).transpose(1, 2)
        p = self._heads(self.linear_pos(positions.encoding)).permute(0, 2, 3, 1)
        content = (q + self.pos_bias_u * scale).transpose(1, 2) @ k
        distance = (q + self.pos_bias_v * scale).transpose(1, 2) @ p
        scores = content + shift(distance, positions)
        if positions.keys is not None:
            scores = torch.where(positions.keys, scores, MASKED)
        attended = self.dropout(scores.softmax(dim=-1)) @ v
        joined = reshape(attended.transpose(1, 2), 0, -1, self.heads * self.size)
        out: Tensor = self.linear_out(joined)
        return out

    def _heads(self, signal: Tensor) -> Tensor:
        """[batch, frames, width] as [batch, frames, heads, size]."""
        return reshape(signal, 0, -1, self.heads, self.size)


def shift(distance: Tensor, positions: Positions) -> Tensor:
    """Bring each row's products with distances n, n - 1 ... 1 - n to its n keys.

    Row i holds the distance i - j at n - i + j. One after the other, without the first n numbers,
    rows of 2n - 1 have it at j.

    Args:
        distance: float [batch, heads, n, 2n].
        positions: Of n frames.

    Returns:
        float [batch, heads, n, n].
    """
    flat = reshape(distance, 0, 0, -1)[:, :, positions.frames :]
    return reshape(flat, positions.shifted)[:, :, :, : positions.frames]
