"""The table `few_bits` of bench.py: QuartzNet15x5 with weights of 5 and 4 bits.

Activations stay float. Trainings take 10 to 15 minutes each on one core that computes in bfloat16;
what is made is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onnx_intq.console import table
from onnx_intq.evaluate import Score

TRAINING = ("--task", 0, "--seconds", 4.8, "--batch-size", 4, "--precision", "bfloat16")
"""Distillation alone: crops of 4.8 s, and the transcripts are not read."""
LENGTHS = {5: ("--steps", 500, "--rate", 2e-4), 4: ("--steps", 800, "--rate", 5e-4)}
"""Bits -> how long and how fast to train."""


def print_table(
    made: Callable[..., Path],
    scores: Callable[[Sequence[Path]], Sequence[Score]],
    feeds: Path,
    manifest: Path,
) -> None:
    """Compress QuartzNet15x5 in every way, and print word errors and file sizes.

    Args:
        made: `made(name, command, *options)` gives the model that `onnx-intq command` makes of the
            float model, made if missing.
        scores: Scores of models on speech_dev, against the float model.
        feeds: Synthetic feeds, for the boosters.
        manifest: Speech to train on.
    """
    models: dict[tuple[int, str], Path] = {}
    for bits, length in LENGTHS.items():
        for kind in ("uniform", "lloyd"):
            options = ("--bits", bits, "--codebook", kind)
            name = f"few-{kind}-{bits}"
            models[bits, f"{kind}, no data"] = made(name, "compress", *options)
            boosted = (*options, "--data", feeds)
            models[bits, f"{kind}, synthetic data"] = made(f"{name}-boost", "compress", *boosted)
        command = ("train", "--manifest", manifest, "--bits", bits, *TRAINING, *length)
        models[bits, "General Quantizer"] = made(f"few-gq-{bits}", *command)
    found = scores(list(models.values()))
    rows = [
        (bits, way, s.errors, f"{s.differs:.2f}", f"{models[bits, way].stat().st_size / 1e6:.2f}")
        for (bits, way), s in zip(models, found, strict=True)
    ]
    header = ("bits", "weights", "errors", "differs %", "MB")
    table("QuartzNet15x5, weights only, speech_dev, 1,173 words", header, rows)
