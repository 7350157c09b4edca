"""What train_digits.py does otherwise for an RNN-T: front end that streams, loss, decoding."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from digit_strings import TRAINING, Voice, draw, record
from torch import Tensor, nn

from onnx_intq.frontend import FixedNormalization, Floats, Frontend, log_mel
from onnx_intq.models.rnnt import Rnnt
from onnx_intq.models.rnnt_export import export_rnnt
from onnx_intq.transducer_loss import transducer_loss
from onnx_intq.transducer_recognizer import TransducerRecognizer

MEASURED = 50
"""Strings of each speaker that the front end's means and deviations are measured on."""


def fixed_frontend(frontend: Frontend, voices: Sequence[Voice], seed: int) -> Frontend:
    """The front end with means and deviations of training strings in place of the utterance's."""
    rng, plain = np.random.default_rng([seed, MEASURED]), replace(frontend, normalize=None)
    strings = [draw(rng, voice, TRAINING) for voice in voices for _ in range(MEASURED)]
    heard = [log_mel(record(rng, string.samples, TRAINING), plain) for string in strings]
    frames = np.concatenate(heard, axis=1).astype(np.float64)
    mean, std = (tuple(map(float, each(axis=1).round(3))) for each in (frames.mean, frames.std))
    return replace(frontend, normalize=FixedNormalization(fixed_mean=mean, fixed_std=std))


def loss(network: Rnnt, features: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """The mean RNN-T loss of strings of one length.

    Args:
        network: In training mode.
        features: float32 [batch, mels, frames].
        targets: Labels of all strings in a row, int64 [labels].
        lengths: Labels of each string, int64 [batch].
    """
    labels = nn.utils.rnn.pad_sequence([*torch.split(targets, lengths.tolist())], batch_first=True)
    logits = network(features, labels)
    frames = torch.full_like(lengths, logits.shape[1])
    return transducer_loss(logits, labels, frames, lengths, len(network.config.labels)).mean()


def transcriber(network: Rnnt, frontend: Frontend) -> Callable[[Floats], str]:
    """What writes features [mels, frames] as text, by greedy search on the exported graphs."""
    with tempfile.TemporaryDirectory() as folder:
        export_rnnt(network, Path(folder) / "rnnt", frontend=frontend)
        recognizer = TransducerRecognizer(Path(folder) / "rnnt", threads=1)
    return lambda features: recognizer.transcribe([features])[0]
