"""RNN-T acoustic models of LSTMs: an encoder that streams, a predictor, a joint network.

Graves, "Sequence Transduction with Recurrent Neural Networks", arXiv:1211.3711, with the structure
of He et al., "Streaming End-to-End Speech Recognition for Mobile Devices", ICASSP 2019, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from onnx_intq.models.quartznet import ENGLISH
from onnx_intq.models.rnnt_encoder import LstmEncoder
from onnx_intq.models.rnnt_joint import ACTIVATIONS, Joint
from onnx_intq.models.rnnt_predictor import Predictor
from onnx_intq.transform import IntqError


@dataclass(frozen=True, kw_only=True)
class RnntConfig:
    """A whole network: mel features and labels in, `len(labels) + 1` classes out, the blank last.

    Attributes:
        labels: Characters or SentencePiece pieces, without the blank.
        features: Mel bands.
        factor: Input frames per frame of the encoder.
        width: Of the encoder's layers.
        layers: Of the encoder.
        predictor: Width of the predictor's layers.
        predictor_layers: How many these are.
        joint: Width of the joint network.
        activation: Of the joint network, one of `rnnt_joint.ACTIVATIONS`.
        dropout: Of the joint network's hidden layer.

    Raises:
        IntqError: A size is out of range or a name is unknown.
    """

    labels: tuple[str, ...] = ENGLISH
    features: int = 64
    factor: int = 6
    width: int = 192
    layers: int = 2
    predictor: int = 96
    predictor_layers: int = 1
    joint: int = 128
    activation: str = "tanh"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = (self.features, self.factor, self.width, self.layers, self.predictor)
        if not self.labels or min(*sizes, self.predictor_layers, self.joint) < 1:
            raise IntqError(
                "an RNN-T needs labels, features, frames per stack, layers and widths; "
                "one is empty; correct the configuration"
            )
        if self.activation not in ACTIVATIONS:
            raise IntqError(
                f"unknown activation {self.activation!r}; expected one of: {', '.join(ACTIVATIONS)}"
            )
        if not 0 <= self.dropout < 1:
            raise IntqError("dropout must lie in [0, 1); correct the configuration")


class Rnnt(nn.Module):
    """A network built from its configuration, with PyTorch's initial weights.

    Attributes:
        encoder: Features [batch, mels, time] -> [batch, frames, width], with its states.
        decoder: The predictor, by NeMo's name: labels -> [batch, labels, width], with its states.
        joint: Both -> logits [batch, frames, labels, classes].
    """

    def __init__(self, config: RnntConfig) -> None:
        super().__init__()
        classes = len(config.labels) + 1
        self.config = config
        self.encoder = LstmEncoder(config.factor, config.features, config.width, config.layers)
        self.decoder = Predictor(classes, config.predictor, config.predictor_layers)
        self.joint = Joint(
            config.width,
            config.predictor,
            config.joint,
            classes,
            config.activation,
            config.dropout,
        )

    def forward(self, audio_signal: Tensor, labels: Tensor) -> Tensor:
        """Score every label at every frame after every part of `labels`, as training needs it.

        Args:
            audio_signal: Features, float [batch, mels, time].
            labels: int64 [batch, U].

        Returns:
            Logits, float [batch, frames, U + 1, labels + 1].
        """
        encoded, _ = self.encoder(audio_signal)
        blank = len(self.config.labels)
        predicted, _ = self.decoder(nn.functional.pad(labels, (1, 0), value=blank))
        logits: Tensor = self.joint(encoded, predicted)
        return logits
