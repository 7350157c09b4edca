"""The prediction network of an RNN-T, as NeMo's RNNTDecoder with its names: embedding and LSTM."""

from __future__ import annotations

from torch import Tensor, nn

from onnx_intq.models.rnnt_encoder import States, open_forget_gates


class Recurrence(nn.Module):
    """The LSTM's layers, under the name they have in NeMo."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.lstm = open_forget_gates(nn.LSTM(width, width, layers))

    def forward(self, embedded: Tensor, states: States | None) -> tuple[Tensor, States]:
        """Map [time, batch, width] to the same shape, and give the states after it."""
        predicted: tuple[Tensor, States] = self.lstm(embedded, states)
        return predicted


class Prediction(nn.Module):
    """The embedding, in which the blank is zero, and the LSTM."""

    def __init__(self, classes: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width, padding_idx=classes - 1)
        self.dec_rnn = Recurrence(width, layers)


class Predictor(nn.Module):
    """Sees the labels written so far; the blank stands for the start."""

    def __init__(self, classes: int, width: int, layers: int) -> None:
        super().__init__()
        self.prediction = Prediction(classes, width, layers)

    def forward(self, labels: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Take in labels, one after another.

        Args:
            labels: int64 [batch, labels]; the first of all is the blank.
            states: Those after the labels before, float [layers, batch, width] each; None at the
                start, where they are zero.

        Returns:
            Float [batch, labels, width], and the states after the last label.
        """
        embedded = self.prediction.embed(labels).transpose(0, 1)
        predicted, after = self.prediction.dec_rnn(embedded, states)
        return predicted.transpose(0, 1), after
