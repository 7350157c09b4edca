"""General Quantizer against S8BQAT, uniform levels and no training, on strings of spoken digits.

The RNN-T and the Conformer that are shipped are fine-tuned to weights of 8 to 2 bits, every method
with the same steps, rate and seed, on strings of the training recordings. Counted are the word
errors on strings of the held-out recordings; activations stay float. On a CPU, a minute per cell:

    python tools/bench_sub8bit.py
    python tools/bench_sub8bit.py --model rnnt --bits 5 3 --method gq uniform --json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from digit_strings import (
    TRAINING,
    DigitString,
    Voice,
    draw,
    held_out_string,
    read_voices,
    record,
    write_strings,
)

from onnx_intq.console import table
from onnx_intq.evaluate import evaluate
from onnx_intq.models.export import export_named
from onnx_intq.progress import Tick
from onnx_intq.training import Run, Training, train
from onnx_intq.training_plan import Plan
from onnx_intq.training_source import TrainingSource

ASSETS = Path(
    os.environ.get("INTQ_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets")
)
PRETRAINED = Path(__file__).resolve().parents[1] / "models" / "pretrained"
MODELS = {"rnnt": "digits-rnnt", "conformer": "digits-conformer"}
"""The models by the names that the command line takes, and their files."""
METHODS = ("gq", "s8bqat", "uniform", "none")
BITS = (8, 6, 5, 4, 3, 2)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training, and what came of it.

    Attributes:
        model: One of `MODELS`.
        method: One of `METHODS`, or "float" for the model as it is.
        bits: Of the weights.
        errors: Word errors on the held-out strings.
        words: In these.
        wer: In percent.
        before: Loss on held-out strings of the training recordings, before the first step.
        after: The same of the best step.
        seconds: That the training took.
    """

    model: str
    method: str
    bits: int
    errors: int
    words: int
    wer: float
    before: float | None = None
    after: float | None = None
    seconds: float | None = None


def training_strings(voices: Sequence[Voice], count: int, seed: int) -> Iterator[DigitString]:
    """Strings of recordings that are not held out, as they were spoken for the models' training."""
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        spoken = draw(rng, voices[number % len(voices)], TRAINING)
        yield replace(spoken, samples=record(rng, spoken.samples, TRAINING))


def cells(
    model: str,
    exported: Path,
    strings: tuple[Path, Path],
    plans: Iterable[Plan],
    folder: Path,
) -> Iterator[Cell]:
    """The float model, then a cell per plan.

    Args:
        model: One of `MODELS`.
        exported: Its float ONNX file or folder.
        strings: Manifests to train on and to count errors on.
        plans: How to train.
        folder: For the trained models.
    """
    yield _cell(model, exported, strings[1], "float", 32)
    for plan in plans:
        output = folder / f"{model}-{plan.method}-{plan.bits}{exported.suffix}"
        source = TrainingSource(manifest=strings[0])
        done = train(exported, output, source, plan, Run(), bar=_silent)
        yield _cell(model, output, strings[1], plan.method, plan.bits, done)


def _cell(
    model: str, path: Path, manifest: Path, method: str, bits: int, done: Training | None = None
) -> Cell:
    score = evaluate(path, manifest, threads=1).total
    found = Cell(
        model=model,
        method=method,
        bits=bits,
        errors=score.errors,
        words=score.words,
        wer=score.wer,
    )
    if done is None:
        return found
    progress = done.progress
    return replace(
        found, before=progress.history[0][1], after=progress.best_loss, seconds=done.seconds
    )


@contextmanager
def _silent(_title: str) -> Iterator[Tick]:
    """In place of a progress bar."""
    yield lambda _done, _total: None


def print_tables(found: Sequence[Cell], methods: Sequence[str]) -> None:
    """One table of errors per model, bits by methods."""
    for model in dict.fromkeys(cell.model for cell in found):
        own = [cell for cell in found if cell.model == model]
        errors = {(cell.bits, cell.method): cell for cell in own}
        start = own[0]
        widths = dict.fromkeys(cell.bits for cell in own[1:])
        rows = [(f"{bits}", *(_shown(errors.get((bits, m))) for m in methods)) for bits in widths]
        title = f"{model}: word errors of {start.words}; float {_shown(start)}"
        table(title, ("bits", *methods), rows)


def _shown(cell: Cell | None) -> str:
    return "-" if cell is None else f"{cell.errors} ({cell.wer:.2f} %)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", nargs="+", choices=MODELS, default=list(MODELS), help="(both)")
    add("--bits", nargs="+", type=int, choices=range(1, 9), default=BITS, help="(%(default)s)")
    add("--method", nargs="+", choices=METHODS, default=METHODS, help="(%(default)s)")
    add("--steps", type=int, default=120, help="of every training (%(default)s)")
    add("--batch-size", type=int, default=16, help="strings (%(default)s)")
    add("--rate", type=float, default=1e-3, help="learning rate (%(default)s)")
    add("--training", type=int, default=1200, help="strings to train on (%(default)s)")
    add("--held-out", type=int, default=600, help="strings to count errors on (%(default)s)")
    add("--seed", type=int, default=0, help="%(default)s")
    add("--assets", type=Path, default=ASSETS, help="holds fsdd/")
    add("--pretrained", type=Path, default=PRETRAINED, help="holds the .nemo files")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    base = Plan(
        steps=options.steps,
        batch_size=options.batch_size,
        rate=options.rate,
        validate_every=max(1, options.steps // 6),
        held_out=0.08,
        seed=options.seed,
    )
    plans = [replace(base, bits=b, method=m) for b in options.bits for m in options.method]
    found: list[Cell] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        strings = _written_strings(options, folder)
        for model in options.model:
            suffix = "" if model == "rnnt" else ".onnx"
            exported = folder / f"{model}{suffix}"
            export_named(str(options.pretrained / f"{MODELS[model]}.nemo"), exported)
            for cell in cells(model, exported, strings, plans, folder):
                found.append(cell)
                clock = time.strftime("%H:%M:%S")
                print(f"{clock} {model} {cell.method} {cell.bits}: {_shown(cell)}", file=sys.stderr)
    if options.json:
        print(json.dumps([asdict(cell) for cell in found], indent=1))
    else:
        print_tables(found, options.method)


def _written_strings(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The manifests to train on and to count errors on."""
    recordings = options.assets / "fsdd"
    voices = read_voices(recordings, held_out=False)
    write_strings(folder / "train", training_strings(voices, options.training, options.seed))
    others = read_voices(recordings, held_out=True)
    tested = (held_out_string(others, n, seed=options.seed) for n in range(options.held_out))
    write_strings(folder / "test", tested)
    return folder / "train" / "manifest.json", folder / "test" / "manifest.json"


if __name__ == "__main__":
    main()
