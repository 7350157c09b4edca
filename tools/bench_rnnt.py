"""The table `rnnt` of bench.py: the small RNN-T in 8 and 5 bits, in floats and in integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bench_compress
import bench_conformer

from onnx_intq.console import table
from onnx_intq.evaluate import evaluate
from onnx_intq.files import file_bytes
from onnx_intq.transducer_folder import part_paths

STRINGS = 1200
"""Held-out strings: 5,315 words."""
CALIBRATION_STRINGS = 64
SEEDS = (7, 1)
"""Of the held-out strings and of those that give the ranges."""
MEASURED = ("8 bits, integer", "5 bits, integer", "8 bits, weights only", "5 bits, weights only")


def print_tables(assets: Path, work: Path, made: Callable[..., Path]) -> None:
    """Quantize, count word errors and equal transcripts; measure memory and latency.

    Args:
        assets: Holds `fsdd/`.
        work: Folder for the strings.
        made: `made(name, command, model, *options)` gives the folder that `onnx-intq command`
            makes of the model, made if missing.
    """
    strings = bench_conformer.strings
    tested = strings(assets, work / "rnnt-held-out", STRINGS, held_out=True, seed=SEEDS[0])
    ranges = strings(
        assets, work / "rnnt-ranges", CALIBRATION_STRINGS, held_out=False, seed=SEEDS[1]
    )
    models = _models(made, ranges)
    rows = []
    for name, folder in models.items():
        found = evaluate(folder, tested, against=models["float"], threads=1)
        same = sum(h.text == h.against for h in found.hypotheses) / len(found.hypotheses)
        score, size = found.total, sum(map(file_bytes, part_paths(folder).values()))
        cells = (score.errors, f"{score.differs:.2f}", f"{100 * same:.2f}", f"{size / 1e3:.0f}")
        rows.append((name, *cells))
    header = ("RNN-T", "errors", "differs %", "same strings %", "kB")
    table(f"{STRINGS} held-out strings of digits, greedy", header, rows)
    bench_compress.main([f"{name}={models[name]}" for name in MEASURED])


def _models(made: Callable[..., Path], data: Path) -> dict[str, Path]:
    source = made("rnnt", "export", "digits-rnnt")
    few = {bits: made(f"rnnt-w{bits}", "compress", source, "--bits", bits) for bits in (8, 5, 4)}
    integer = ("--target", "integer", "--data", data)
    eight = made("rnnt-integer", "quantize", source, *integer)
    five = made("rnnt-integer-w5-plain", "quantize", few[5], *integer)
    return {
        "float": source,
        "8 bits, weights only": few[8],
        "5 bits, weights only": few[5],
        "4 bits, weights only": few[4],
        "8 bits, ort": made("rnnt-ort", "quantize", source, "--target", "ort", "--data", data),
        "8 bits, integer": eight,
        "8 bits, integer, no data": made("rnnt-free", "quantize", source, "--target", "integer"),
        "8 bits, integer, tables": made(
            "rnnt-lut", "quantize", source, *integer, "--nonlinear", "lut"
        ),
        "5 bits, integer": made("rnnt-integer-w5", "compress", five),
    }
