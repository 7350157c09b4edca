"""The joint network of an RNN-T, as NeMo's RNNTJoint with its names: two sums and a linear layer.

Source: Graves et al., "Speech Recognition with Deep Recurrent Neural Networks", ICASSP 2013,
section 3.2.
"""

from __future__ import annotations

from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
"""By NeMo's names."""


class Joint(nn.Module):
    """Scores every label at every frame after every label."""

    def __init__(
        self,
        encoded: int,
        predicted: int,
        width: int,
        classes: int,
        activation: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.enc = nn.Linear(encoded, width)
        self.pred = nn.Linear(predicted, width)
        thinned = [nn.Dropout(dropout)] if dropout else []
        self.joint_net = nn.Sequential(
            ACTIVATIONS[activation](), *thinned, nn.Linear(width, classes)
        )

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the logits."""
        found: nn.Linear = self.joint_net[-1]  # type: ignore[assignment]
        return found

    def forward(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """Map [batch, T, encoded] and [batch, U, predicted] to logits [batch, T, U, classes]."""
        logits: Tensor = self.joint_net(
            self.enc(encoded).unsqueeze(2) + self.pred(predicted).unsqueeze(1)
        )
        return logits
