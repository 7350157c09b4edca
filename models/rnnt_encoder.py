"""An encoder that hears only the past: stacked frames, a linear layer, LSTM layers in a row.

The sub-sampling is NeMo's StackingSubsampling (He et al., "Streaming End-to-End Speech Recognition
for Mobile Devices", ICASSP 2019, section 2.1), with its names; the layers are numbered as in NeMo's
RNNEncoder, which has projections and norms between them that are left out here.

Law: chunks of whole stacks, with the states carried over, give what the whole utterance gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

States = tuple[Tensor, Tensor]
"""Hidden and cell state of all layers, float [layers, batch, width] each."""


class StackingSubsampling(nn.Module):
    """Joins `factor` frames to one and maps it linearly; zeros fill up the last one."""

    def __init__(self, factor: int, features: int, width: int) -> None:
        super().__init__()
        self.factor = factor
        self.proj_out = nn.Linear(factor * features, width)

    def forward(self, signal: Tensor) -> Tensor:
        """Map [batch, features, time] to [batch, ceil(time / factor), width]."""
        batch, features, time = signal.shape
        padded = nn.functional.pad(signal, (0, -time % self.factor))
        frames = padded.transpose(1, 2).reshape(batch, -1, self.factor * features)
        stacked: Tensor = self.proj_out(frames)
        return stacked


class LstmEncoder(nn.Module):
    """The sub-sampling, then LSTMs (Hochreiter and Schmidhuber, 1997, with forget gates)."""

    def __init__(self, factor: int, features: int, width: int, layers: int) -> None:
        super().__init__()
        self.pre_encode = StackingSubsampling(factor, features, width)
        self.layers = nn.ModuleList(
            open_forget_gates(nn.LSTM(width, width, batch_first=True)) for _ in range(layers)
        )

    @property
    def lstms(self) -> list[nn.LSTM]:
        """The layers in order."""
        return [layer for layer in self.layers if isinstance(layer, nn.LSTM)]

    def forward(self, signal: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Encode a chunk.

        Args:
            signal: Features, float [batch, features, time].
            states: Those after the chunk before; None at the start, where they are zero.

        Returns:
            Float [batch, frames, width], and the states after the last frame.
        """
        hidden = self.pre_encode(signal)
        after: list[Sequence[Tensor]] = []
        for number, layer in enumerate(self.lstms):
            before = states and tuple(state[number : number + 1] for state in states)
            hidden, ended = layer(hidden, before)
            after.append(ended)
        h, c = (torch.cat(each) for each in zip(*after, strict=True))
        return hidden, (h, c)


def open_forget_gates(lstm: nn.LSTM) -> nn.LSTM:
    """Set the forget gates' biases to 1, in place, as NeMo does.

    Source: Jozefowicz et al., "An Empirical Exploration of Recurrent Network Architectures", ICML
    2015, section 2.2.
    """
    gate = slice(lstm.hidden_size, 2 * lstm.hidden_size)
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            if name.startswith("bias"):
                parameter[gate] = 1.0 if "_ih_" in name else 0.0
    return lstm
