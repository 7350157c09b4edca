"""The table `boosters` of bench.py: each pass that raises accuracy by data, on and off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onnx_intq.console import table
from onnx_intq.evaluate import Score

BOOSTS = (
    "none",
    "equalize",
    "choose_grids",
    "round_weights",
    "correct_bias",
    "round_weights,correct_bias",
    "choose_grids,round_weights,correct_bias",
)
"""What `onnx-intq quantize --boost` takes."""
WIDTHS = (8, 6, 4)
"""Bits of weights; activations have 8."""


def print_table(
    quantized: Callable[..., Path], scores: Callable[[Sequence[Path]], Sequence[Score]]
) -> None:
    """Quantize QuartzNet15x5 with each, on the same synthetic data, and print the word errors.

    Args:
        quantized: `quantized(name, *options)` gives the model of that name, made if missing.
        scores: Scores of models on speech_dev, against the float model.
    """
    models = {
        (names, bits): quantized(
            f"boost-{names.replace(',', '-')}-w{bits}", "-w", bits, "--boost", names
        )
        for names in BOOSTS
        for bits in WIDTHS
    }
    found = dict(zip(models, scores(list(models.values())), strict=True))
    cells = {key: f"{score.errors} / {score.differs:.2f}" for key, score in found.items()}
    rows = [(names, *(cells[names, bits] for bits in WIDTHS)) for names in BOOSTS]
    header = ("boost", *(f"W{bits}A8" for bits in WIDTHS))
    table("speech_dev, zero-shot, ort: errors of 1,173 words / differs %", header, rows)
