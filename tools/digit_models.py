"""The models that train_digits.py makes: the structure of each, and how it is trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from digit_strings import RATE

from onnx_intq.frontend import Frontend
from onnx_intq.models.conformer import ConformerConfig
from onnx_intq.models.conformer_block import ConformerBlockConfig
from onnx_intq.models.jasper_block import BlockConfig
from onnx_intq.models.nemo_config import NetworkConfig
from onnx_intq.models.quartznet import QuartzNetConfig
from onnx_intq.models.rnnt import RnntConfig
from onnx_intq.speech import WORD_START

FRONTEND = Frontend(sample_rate=RATE)
PIECES = (
    *(f"{WORD_START}{start}" for start in ("e", "f", "n", "o", "s", "t", "th", "ze")),
    *("en", "ev", "ight", "ine", "ive", "ix", "ne", "our", "ree", "ro", "wo"),
)
"""Parts of words, as byte-pair encoding finds them: two per digit, three in "seven"."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train: AdamW under a one-cycle schedule (Smith and Topin, arXiv:1708.07120).

    Attributes:
        steps: Batches to train on.
        batch: Strings per batch.
        rate: Highest learning rate.
        decay: Weight decay.
        clip: Largest norm of the gradient.
        settling: Batches that BatchNorm's final statistics are the mean of.
        seed: Of the weights, the strings and their masks.
        minutes: After these training is given up.
    """

    steps: int = 3000
    batch: int = 32
    rate: float = 4e-3
    decay: float = 1e-2
    clip: float = 1.0
    settling: int = 200
    seed: int = 0
    minutes: float = 60


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model: its structure, and the plan it is trained by."""

    config: NetworkConfig
    plan: Plan


def digits_config() -> QuartzNetConfig:
    """QuartzNet's structure, narrow and short: 273,053 parameters, 20 ms per output frame."""
    body = [
        BlockConfig(filters=128, kernel=kernel, repeat=2, residual=True, separable=True)
        for kernel in (11, 13, 15, 17)
    ]
    first = BlockConfig(filters=128, kernel=11, stride=2, separable=True)
    wide = BlockConfig(filters=128, kernel=21, dilation=2, separable=True)
    last = BlockConfig(filters=192, kernel=1)
    return QuartzNetConfig(blocks=(first, *body, wide, last), features=FRONTEND.features)


def conformer_digits_config() -> ConformerConfig:
    """Conformer's structure, narrow and shallow: 425,476 parameters, 40 ms per output frame.

    At 40 ms a hurried "three" has too few frames for its letters and the blank between its two e,
    hence `PIECES`. Dropout is left out: with recordings changed at every use there is no need.
    """
    block = ConformerBlockConfig(width=64, heads=4, kernel=15, dropout=0, attention_dropout=0)
    return ConformerConfig(
        block=block,
        layers=4,
        labels=PIECES,
        features=FRONTEND.features,
        channels=16,
        longest=512,
        input_dropout=0,
    )


def rnnt_digits_config() -> RnntConfig:
    """LSTMs, few and narrow: 782,932 parameters, 60 ms per output frame, no look ahead."""
    return RnntConfig(
        labels=PIECES,
        features=FRONTEND.features,
        factor=6,
        width=192,
        layers=2,
        predictor=96,
        joint=128,
    )


RECIPES = {
    "quartznet": Recipe(config=digits_config(), plan=Plan()),
    "conformer": Recipe(
        config=conformer_digits_config(), plan=Plan(steps=2500, batch=16, rate=3e-3)
    ),
    "rnnt": Recipe(config=rnnt_digits_config(), plan=Plan(steps=7500, batch=32, rate=3e-3)),
}
"""By the names that the command line takes."""


def encode(text: str, labels: Sequence[str]) -> list[int]:
    """Numbers of the labels that a text of small letters and spaces consists of.

    Law: `greedy`'s text of these labels, with blanks between equal ones, is the text, but for a
    space before it where the labels are pieces. Of two labels that fit the longer is taken.
    """
    if any(label.startswith(WORD_START) for label in labels):
        text = WORD_START + text.replace(" ", WORD_START)
    longest_first = sorted(map(re.escape, labels), key=len, reverse=True)
    return [labels.index(label) for label in re.findall("|".join(longest_first), text)]
