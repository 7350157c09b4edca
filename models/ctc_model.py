"""What all CTC models share: an encoder with masks, a decoder, log-probabilities from features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Decoder(nn.Module):
    """NeMo's ConvASRDecoder: a 1x1 convolution to the classes, then log-softmax."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.decoder_layers = nn.Sequential(nn.Conv1d(inputs, classes, 1))

    def forward(self, encoded: Tensor) -> Tensor:
        """Map [batch, filters, time'] to log-probabilities [batch, time', classes]."""
        logits: Tensor = self.decoder_layers(encoded)
        return logits.transpose(1, 2).log_softmax(dim=-1)


class CtcModel(nn.Module):
    """Features in, log-probabilities out.

    Attributes:
        encoder: Maps features [batch, mels, time] and the mask of valid frames, or None, to [batch,
            channels, time'] and the mask there.
        decoder: Maps these to log-probabilities [batch, time', classes].
    """

    encoder: nn.Module
    decoder: nn.Module

    def forward(
        self, audio_signal: Tensor, length: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute CTC log-probabilities.

        Args:
            audio_signal: Features, float [batch, mels, time].
            length: Valid frames of each utterance, int64 [batch]; None: all frames are valid.

        Returns:
            Log-probabilities float [batch, time', labels + 1]; with `length` also the valid frames
            of the output, int64 [batch]. What lies beyond them has no meaning.

        Raises:
            IntqError: The encoder cannot take so long an input.
        """
        mask = None if length is None else _mask_from_length(length, audio_signal.shape[2])
        encoded, mask = self.encoder(audio_signal, mask)
        log_probs: Tensor = self.decoder(encoded)
        return log_probs if mask is None else (log_probs, mask.sum(dim=(1, 2)))


def _mask_from_length(length: Tensor, frames: int) -> Tensor:
    """True for the frames before `length` [batch]: bool [batch, 1, frames]."""
    return (torch.arange(frames, device=length.device) < length.unsqueeze(1)).unsqueeze(1)
