"""The table `conformer` of bench.py: the trained Conformer on held-out strings of digits.

Ours sees no data, unless its row says so; onnxruntime's quantizer sees `CALIBRATION_STRINGS` of the
training recordings. All are scored on `HELD_OUT` strings of recordings that nothing was trained on.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from digit_strings import held_out_string, read_voices, write_strings

from onnx_intq import feeds, graph
from onnx_intq.console import table
from onnx_intq.evaluate import Hypothesis, Score, evaluation
from onnx_intq.feeds import speech_batch
from onnx_intq.frontend import Floats
from onnx_intq.manifest import read_manifest
from onnx_intq.recognizer import Recognizer
from onnx_intq.samples import specs
from onnx_intq.speech import features_of

MODEL = "digits-conformer"
HELD_OUT = 1200
"""Strings: 5,315 words, so that one word is 0.02 %."""
CALIBRATION_STRINGS = 24
CALIBRATION_SEED = 1
OURS: dict[str, tuple[str, ...]] = {
    "W8A8 zero-shot, ort": (),
    "W8A8 zero-shot, integer": ("--target", "integer"),
    "W8A8 zero-shot, integer, -a mixed": ("--target", "integer", "-a", "mixed"),
    "W6A8 zero-shot, ort": ("-w", "6"),
    "W6A8 zero-shot, integer": ("--target", "integer", "-w", "6"),
}
"""Options of `onnx-intq quantize` by the rows' names."""
QuantizeStatic = Callable[[Path, Path, Path, bool], None]
"""Float model, file to write, feeds, whether activations are signed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model's score.

    Attributes:
        model: What it is.
        score: Its word errors, and the words that differ from the float model's.
        megabytes: Size of the file.
    """

    model: str
    score: Score
    megabytes: float


def rows(assets: Path, work: Path, peer: QuantizeStatic) -> list[Row]:
    """Score the float model, ours and onnxruntime's; what is made is kept in `work`.

    Args:
        assets: Holds `fsdd/`.
        work: Folder of the models, the strings and the feeds.
        peer: onnxruntime's quantizer.

    Raises:
        IntqError: The data is missing.
        subprocess.CalledProcessError: A model cannot be made.
    """
    manifest = strings(assets, work / "digits-held-out", HELD_OUT, held_out=True, seed=0)
    models = _models(assets, work, peer)
    source = Recognizer(models["float"], threads=1)
    utterances = read_manifest(manifest)
    features = [features_of(utterance, source.frontend) for utterance in utterances]
    references = [utterance.text or "" for utterance in utterances]
    against = _texts(source, features)
    found = []
    for name, path in models.items():
        texts = _texts(Recognizer(path, threads=1), features)
        score = _score(references, texts, against)
        found.append(Row(model=name, score=score, megabytes=path.stat().st_size / 1e6))
    return found


def print_table(assets: Path, work: Path, peer: QuantizeStatic) -> None:
    """Print the rows."""
    found = rows(assets, work, peer)
    lines = [
        (r.model, s.errors, f"{s.wer:.2f}", f"{s.differs:.2f}", f"{r.megabytes:.2f}")
        for r in found
        for s in [r.score]
    ]
    title = f"trained Conformer, {HELD_OUT} strings of digits, {found[0].score.words:,} words"
    table(title, ("model", "errors", "WER %", "differs %", "MB"), lines)


def _models(assets: Path, work: Path, peer: QuantizeStatic) -> dict[str, Path]:
    source = _made(work / f"{MODEL}.onnx", lambda path: _cli("export", MODEL, "-o", path))
    training = strings(
        assets, work / "digits-training", CALIBRATION_STRINGS, held_out=False, seed=CALIBRATION_SEED
    )
    data = _made(work / f"{MODEL}-real.npz", lambda path: _write_feeds(source, training, path))
    synthetic = _made(work / f"{MODEL}-kl.npz", lambda path: _cli("synthesize", source, "-o", path))
    models = {"float": source}
    for name, options in OURS.items():
        models[name] = _quantized(work, source, name, "--data", synthetic, *options)
    real = f"W8A8 {CALIBRATION_STRINGS} real strings, ort"
    models[real] = _quantized(work, source, real, "--data", data)
    for signed in (False, True):
        name = f"onnxruntime, {CALIBRATION_STRINGS} real strings, {'s8' if signed else 'u8'}"
        models[name] = _made(_file(work, name), lambda path, s=signed: peer(source, path, data, s))
    return models


def _texts(recognizer: Recognizer, features: Sequence[Floats]) -> list[str]:
    return [" ".join(recognizer.transcribe([each])[0].split()) for each in features]


def _score(references: Sequence[str], texts: Sequence[str], against: Sequence[str]) -> Score:
    hypotheses = [
        Hypothesis(audio=str(number), split="", reference=said, text=text, against=float_text)
        for number, (said, text, float_text) in enumerate(
            zip(references, texts, against, strict=True)
        )
    ]
    return evaluation(hypotheses).total


def strings(assets: Path, folder: Path, count: int, *, held_out: bool, seed: int) -> Path:
    """The manifest of clean strings of either half of the recordings."""
    manifest = folder / "manifest.json"
    if not manifest.exists():  # it is written last
        voices = read_voices(assets / "fsdd", held_out=held_out)
        write_strings(folder, (held_out_string(voices, n, seed=seed) for n in range(count)))
    return manifest


def _write_feeds(model: Path, manifest: Path, path: Path) -> None:
    inputs, frontend = specs(graph.load(model)), Recognizer(model).frontend
    utterances = read_manifest(manifest)
    feeds.write(path, (speech_batch([features_of(u, frontend)], inputs) for u in utterances))


def _quantized(work: Path, source: Path, name: str, *options: object) -> Path:
    return _made(_file(work, name), lambda path: _cli("quantize", source, "-o", path, *options))


def _file(work: Path, name: str) -> Path:
    return work / f"{MODEL}-{name.replace(', ', '-').replace(' ', '-')}.onnx"


def _made(path: Path, make: Callable[[Path], object]) -> Path:
    if not path.exists():
        make(path)
    return path


def _cli(*arguments: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "onnx_intq.cli", *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
