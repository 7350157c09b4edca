"""Manifests in NeMo's format: one JSON object per line, one line per utterance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx_intq.transform import IntqError

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3"})
"""Files that count as utterances where a folder stands in place of a manifest."""

Entry = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One line of a manifest.

    Attributes:
        audio: The audio file.
        text: The reference transcript, None if unknown.
        split: The part of the data it belongs to, "" if unnamed.
        offset: Where it starts in the file, seconds.
        duration: Seconds from there, None for all the rest.
    """

    audio: Path
    text: str | None = None
    split: str = ""
    offset: float = 0
    duration: float | None = None


def read_manifest(path: str | Path) -> tuple[Utterance, ...]:
    """Read a manifest, or take every audio file of a folder, sorted by name, without transcripts.

    Keys per line: `audio_filepath` (absolute, or relative to the manifest's folder), optionally
    `text`, `split`, and `offset` with `duration` (without `offset` the whole file is meant, for
    rounded durations would cut words off).

    Raises:
        IntqError: The manifest is missing, empty or invalid (with the line's number), or an audio
            file it names is missing.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in AUDIO_SUFFIXES)
        utterances = tuple(Utterance(audio=file) for file in files)
    else:
        utterances = tuple(_utterances(path))
    if not utterances:
        raise IntqError(
            f"{path}: holds no utterances; expected audio files or a manifest with one JSON object "
            "per line"
        )
    return utterances


def _utterances(path: Path) -> Iterator[Utterance]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _utterance(line, path.parent, f"{path}, line {number}")
    except OSError as error:
        raise IntqError(
            f"{path}: cannot be read ({error.strerror}); expected a manifest; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise IntqError(f"{path}: is not text; expected a manifest or an .npz file") from error


def _utterance(line: str, folder: Path, place: str) -> Utterance:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise IntqError(f"{place}: invalid JSON ({error}); expected one object per line") from error
    if not isinstance(entry, dict):
        raise IntqError(f"{place}: not a JSON object; expected keys audio_filepath and text")
    audio, text = entry.get("audio_filepath"), entry.get("text")
    if not isinstance(audio, str) or not audio:
        raise IntqError(f"{place}: audio_filepath is {audio!r}; expected the name of a file")
    if not (text is None or isinstance(text, str)):
        raise IntqError(f"{place}: text is {text!r}; expected a string")
    if not (folder / audio).is_file():
        raise IntqError(f"{place}: no file {folder / audio}; correct audio_filepath")
    return Utterance(
        audio=folder / audio,
        text=text,
        split=str(entry.get("split") or ""),
        offset=_seconds(entry, "offset", place) or 0,
        duration=_seconds(entry, "duration", place) if entry.get("offset") is not None else None,
    )


def _seconds(entry: Entry, key: str, place: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise IntqError(f"{place}: {key} is {value!r}; expected seconds, 0 or more")
    return float(value)
