"""How often INT8 MatchboxNet hears another word than float: spoken digits, resampled to 16 kHz.

The model is foreign: an ONNX file with its original BatchNorms and no word on its front end. That
is torchaudio's MFCC: the setting with the most digits heard right (266 of 300), of those tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_intq import feeds
from onnx_intq.console import table
from onnx_intq.frontend import Floats, speech_package
from onnx_intq.runtime import Session
from onnx_intq.speech import read_audio

ASSETS = Path(
    os.environ.get("INTQ_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets")
)
MODEL = "matchboxnet_3x2x64_all35_bn.onnx"
INPUT, FRAMES, FEATURES = "mfcc", 128, 64
RATE = 16_000
"""Hz; a recording is placed in the middle of as many samples, one second, as in training."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LABELS = (  # noqa: SIM905  one line for 35 words
    "backward bed bird cat dog down eight five follow forward four go happy house learn left "
    "marvin nine no off on one right seven sheila six stop three tree two up visual wow yes zero"
).split()
"""Google's speech commands, version 2, as its folders are sorted."""
TESTED = range(5)
"""Recordings of each digit and speaker that are the test set."""


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """Spoken digits.

    Attributes:
        mfcc: float32 [recordings, FEATURES, FRAMES].
        digits: What is said, int64 [recordings].
    """

    mfcc: Floats
    digits: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model on the test set.

    Attributes:
        name: Of the model.
        agreement: Recordings heard as by the float model, as a share.
        accuracy: Recordings heard right, as a share.
        sqnr: Of the logits against the float model's, dB.
    """

    name: str
    agreement: float
    accuracy: float
    sqnr: float


def held_out(assets: Path = ASSETS) -> Recordings:
    """The recordings `{digit}_{speaker}_{index}.wav` with an index in `TESTED`."""
    files = sorted(f for f in (assets / "fsdd").glob("*.wav") if _index(f) in TESTED)
    return Recordings(
        mfcc=np.stack([mfcc(read_audio(file, RATE)) for file in files]),
        digits=np.array([int(file.name[0]) for file in files]),
    )


def _index(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


def mfcc(samples: Floats) -> Floats:
    """Features of one second, float32 [FEATURES, FRAMES]; zeros follow after the last frame.

    25 ms Hann windows every 10 ms, 64 HTK mel filters, decibels cut off 80 below the loudest,
    orthonormal cosine transform.
    """
    librosa = speech_package("librosa")
    spare = max(RATE - len(samples), 0)
    centred = np.pad(samples, (spare // 2, spare - spare // 2))[:RATE]
    power = librosa.feature.melspectrogram(
        y=centred,
        sr=RATE,
        n_fft=512,
        win_length=400,
        hop_length=160,
        n_mels=FEATURES,
        htk=True,
        norm=None,
        pad_mode="reflect",
    )
    decibels = librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=80.0)
    found = librosa.feature.mfcc(S=decibels, n_mfcc=FEATURES, dct_type=2, norm="ortho")
    return np.pad(found, ((0, 0), (0, FRAMES - found.shape[1]))).astype(np.float32)


def rows(models: Sequence[tuple[str, Path]], recordings: Recordings) -> list[Row]:
    """Each model beside the first, which is the float one."""
    logits = [_logits(path, recordings) for _, path in models]
    wanted = logits[0]
    return [
        Row(
            name=name,
            agreement=float((found.argmax(1) == wanted.argmax(1)).mean()),
            accuracy=float((found.argmax(1) == _classes(recordings)).mean()),
            sqnr=_sqnr(wanted, found),
        )
        for (name, _), found in zip(models, logits, strict=True)
    ]


def _logits(path: Path, recordings: Recordings) -> npt.NDArray[np.float64]:
    found = Session(path).run({INPUT: recordings.mfcc})
    (values,) = found.values()
    return values.astype(np.float64)


def _classes(recordings: Recordings) -> npt.NDArray[np.int64]:
    return np.array([LABELS.index(DIGITS[digit]) for digit in recordings.digits])


def _sqnr(wanted: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    noise = np.square(wanted - found).sum()
    return float(10 * np.log10(np.square(wanted).sum() / noise)) if noise else float("inf")


def real_feeds(path: Path, assets: Path = ASSETS, count: int = 24) -> None:
    """Write feeds of other recordings of the same digits, for comparison with real data."""
    files = sorted(f for f in (assets / "fsdd").glob("*.wav") if _index(f) not in TESTED)
    chosen = files[:: len(files) // count][:count]
    feeds.write(path, ({INPUT: mfcc(read_audio(f, RATE))[None]} for f in chosen))


def print_table(assets: Path, made: Callable[..., Path], quantize: Callable[..., object]) -> None:
    """Quantize zero-shot and with real data, and print the rows.

    Args:
        assets: Where the model and the recordings are.
        made: `made(name, make, suffix)` gives the file `name`, made by `make(path)` if missing.
        quantize: `quantize(model, "-o", path, *options)` runs the command of that name.
    """
    source = assets / MODEL
    real = made("keywords-real", lambda path: real_feeds(path, assets), ".npz")
    models = [("float", source)]
    recipes: tuple[tuple[str, tuple[object, ...]], ...] = (
        ("W8A8 zero-shot, ort", ()),
        ("W8A8 zero-shot, tensorrt", ("--target", "tensorrt")),
        ("W8A8 zero-shot, integer", ("--target", "integer")),
        ("W8A8 24 real recordings, ort", ("--data", real)),
        ("W8A8 24 real recordings, integer", ("--data", real, "--target", "integer")),
    )
    for title, options in recipes:

        def make(path: Path, options: Sequence[object] = options) -> object:
            return quantize(source, "-o", path, *options)

        name = "-".join(("keywords", *(Path(str(o)).stem.lstrip("-") for o in options)))
        models.append((title, made(name, make)))
    found = rows(models, held_out(assets))
    title = "Keywords: 300 spoken digits, MatchboxNet (a foreign ONNX file)"
    table(title, ("model", "as float %", "right %", "SQNR dB"), [_cells(row) for row in found])


def _cells(row: Row) -> tuple[str, ...]:
    percents = (f"{100 * value:.1f}" for value in (row.agreement, row.accuracy))
    return (row.name, *percents, f"{row.sqnr:.1f}")
