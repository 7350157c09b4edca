"""Audio files in, text out: reading and resampling audio, labels, greedy CTC decoding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnx_intq.frontend import Floats, Frontend, log_mel, speech_package
from onnx_intq.graph import first_line
from onnx_intq.manifest import Utterance
from onnx_intq.transform import IntqError

FRONTEND_KEY = "onnx_intq.frontend"
"""Metadata key under which a model carries `Frontend.to_json()`."""
LABELS_KEY = "onnx_intq.labels"
"""Metadata key under which a model carries `labels_to_json(labels)`, without the blank."""
WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""Marks the start of a word in SentencePiece labels."""


def read_audio(
    path: str | Path, sample_rate: int, *, offset: float = 0, duration: float | None = None
) -> Floats:
    """Read audio as mono float32 [samples] in [-1, 1], resampled (soxr_hq) where the rate differs.

    Args:
        path: Anything libsndfile reads: WAV, FLAC, Ogg, MP3 ...
        sample_rate: Wanted rate, Hz.
        offset: Where to start, seconds.
        duration: How much to read, seconds; None for all the rest.

    Raises:
        IntqError: The file is missing, unreadable, empty, or holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise IntqError(f"{path}: no such file; expected audio; check the path in the manifest")
    soundfile = speech_package("soundfile")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            file.seek(min(int(offset * rate), file.frames))
            wanted = -1 if duration is None else int(duration * rate)
            channels = file.read(wanted, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise IntqError(f"{path}: not readable as audio ({first_line(error)})") from error
    if not len(channels):
        raise IntqError(f"{path}: holds no audio samples (from {offset:g} s); leave it out")
    if not np.isfinite(channels).all():
        raise IntqError(f"{path}: audio holds NaN or infinity; expected samples in [-1, 1]")
    mono: Floats = channels.mean(axis=1)
    if rate == sample_rate:
        return mono
    resampled: Floats = speech_package("librosa").resample(
        mono, orig_sr=rate, target_sr=sample_rate, res_type="soxr_hq"
    )
    return resampled


def features_of(utterance: Utterance, frontend: Frontend) -> Floats:
    """Features of an utterance, float32 [features, frames].

    Raises:
        IntqError: Its audio cannot be read or is shorter than a frame; the message names the file.
    """
    samples = read_audio(
        utterance.audio,
        frontend.sample_rate,
        offset=utterance.offset,
        duration=utterance.duration,
    )
    try:
        return log_mel(samples, frontend)
    except IntqError as error:
        raise IntqError(f"{utterance.audio}: {error}") from error


def greedy(log_probs: npt.NDArray[np.generic], labels: Sequence[str]) -> str:
    """The text of the most probable CTC path: repeats merged, then blanks dropped.

    Source: Graves et al., "Connectionist Temporal Classification", ICML 2006, section 3.2.

    Args:
        log_probs: [frames, len(labels) + 1], the blank last; any dtype, any monotone scale.
        labels: Characters or SentencePiece tokens.
    """
    best = np.argmax(log_probs, axis=-1)
    starts = np.append(True, best[1:] != best[:-1]) if len(best) else np.zeros(0, bool)
    text = "".join(labels[label] for label in best[starts] if label < len(labels))
    return text.replace(WORD_START, " ")


def labels_to_json(labels: Sequence[str]) -> str:
    """Labels, without the blank, as one line of JSON."""
    return json.dumps(list(labels), ensure_ascii=False)


def labels_from_json(text: str) -> tuple[str, ...]:
    """Read back what `labels_to_json` wrote.

    Raises:
        IntqError: The text is no JSON list of strings.
    """
    try:
        labels = json.loads(text)
    except ValueError as error:
        raise IntqError(f"labels are not JSON ({error}); expected a list of strings") from error
    if not (isinstance(labels, list) and labels and all(isinstance(x, str) for x in labels)):
        raise IntqError(f"labels are {text.strip()[:40]!r}; expected a JSON list of strings")
    return tuple(labels)


def read_frontend(path: str | Path) -> Frontend:
    """Read front-end settings from a JSON file, such as NeMo's `preprocessor` section.

    Raises:
        IntqError: The file is missing or invalid.
    """
    text = _text(path, "front-end settings in JSON")
    try:
        return Frontend.from_json(text)
    except IntqError as error:
        raise IntqError(f"{path}: {error}") from error


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Read labels, without the blank: a JSON list, or text with one label per line.

    Raises:
        IntqError: The file is missing or empty, or its JSON is no list of strings.
    """
    text = _text(path, "labels, one per line or a JSON list")
    if not text.startswith("["):
        return tuple(text.splitlines())
    try:
        return labels_from_json(text)
    except IntqError as error:
        raise IntqError(f"{path}: {error}") from error


def _text(path: str | Path, expected: str) -> str:
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise IntqError(f"{path}: cannot be read ({reason}); expected {expected}") from error
    if not text.strip("\r\n"):
        raise IntqError(f"{path}: is empty; expected {expected}")
    return text
