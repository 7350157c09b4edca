"""Strings of spoken digits made from the Free Spoken Digit Dataset, with transcripts.

Source: Jackson et al., https://github.com/Jakobovski/free-spoken-digit-dataset, whose recordings
0 to 4 of each digit and speaker are its test set. Law: a string depends on the generator, the
recordings and the style alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from onnx_intq.frontend import Floats, speech_package
from onnx_intq.graph import check_output, write_atomically
from onnx_intq.speech import read_audio
from onnx_intq.transform import IntqError

RATE = 8000
"""Sample rate of the recordings, Hz."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = 5
"""Recordings below this index are the test set, at and above it the training set."""
COUNTS = range(2, 8)
"""Digits per string."""
FADE = RATE // 200
"""Samples over which a recording fades in and out: 5 ms, so that tight cuts do not click."""
LEVEL = 0.05
"""Root mean square of a recording before its level is varied."""

Bounds = tuple[float, float]
"""Lowest and highest value, of which one in between is drawn."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How strings are spoken and recorded.

    Attributes:
        gap: Between two digits, seconds.
        edge: Before the first digit and after the last, seconds.
        level: Of each digit, dB.
        noise: Signal-to-noise ratio of the string, dB.
        slope: Power of the noise falls with frequency to this power: 0 is white, 1 pink.
        peak: Of the string, dB below full scale.
        speed: Factor on tempo and pitch of the string.
    """

    gap: Bounds = (0.05, 0.25)
    edge: Bounds = (0.1, 0.3)
    level: Bounds = (-3, 3)
    noise: Bounds = (20, 40)
    slope: Bounds = (1, 1)
    peak: Bounds = (-6, -6)
    speed: Bounds = (1, 1)


TEST = Style()
"""Clean speech at the speakers' own tempo."""
TRAINING = Style(
    gap=(0.01, 0.3),
    edge=(0.05, 0.3),
    level=(-8, 8),
    noise=(5, 50),
    slope=(0, 2),
    peak=(-30, 0),
    speed=(0.85, 1.15),
)


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A speaker's recordings: for each digit some float32 [samples] at `RATE` and `LEVEL`."""

    speaker: str
    digits: tuple[tuple[Floats, ...], ...]


@dataclass(frozen=True, kw_only=True)
class DigitString:
    """Digits of one speaker in a row: float32 [samples] at `RATE`, and their English words."""

    speaker: str
    text: str
    samples: Floats


def read_voices(folder: Path, *, held_out: bool) -> list[Voice]:
    """Read the test set or the training set, sorted by speaker; never both together.

    Raises:
        IntqError: The folder is missing, a speaker lacks a digit, or a file is not readable.
    """
    found: dict[str, list[list[Floats]]] = {}
    for path in sorted(folder.glob("*.wav")):
        digit, speaker, index = _named(path)
        if (index < HELD_OUT) == held_out:
            voice = found.setdefault(speaker, [[] for _ in WORDS])
            voice[digit].append(_even(path))
    for speaker, digits in found.items():
        if not all(digits):
            raise IntqError(f"{folder}: speaker {speaker} lacks a digit; complete the data set")
    if not found:
        raise IntqError(
            f"{folder}: holds no such recordings; expected <digit>_<speaker>_<index>.wav of the "
            "Free Spoken Digit Dataset; change --assets"
        )
    return [Voice(speaker=name, digits=tuple(map(tuple, found[name]))) for name in sorted(found)]


def draw(rng: np.random.Generator, voice: Voice, style: Style) -> DigitString:
    """Speak digits, each as likely as any other, with gaps but without edges or noise."""
    digits = [int(digit) for digit in rng.integers(len(WORDS), size=rng.choice(COUNTS))]
    parts: list[Floats] = []
    for takes in (voice.digits[digit] for digit in digits):
        take = takes[rng.integers(len(takes))]
        parts += [_silence(rng, style.gap), take * _gain(rng, style.level)]
    samples = _at_speed(np.concatenate(parts[1:]), rng.uniform(*style.speed))
    text = " ".join(WORDS[digit] for digit in digits)
    return DigitString(speaker=voice.speaker, text=text, samples=samples)


def record(
    rng: np.random.Generator, speech: Floats, style: Style, length: int | None = None
) -> Floats:
    """Put edges around speech, add noise and set the peak.

    Args:
        rng: Draws the edges, the noise and the peak.
        speech: float32 [samples].
        style: The bounds.
        length: Samples of the result, no fewer than those of `speech`; the edges are then what
            remains, divided at random.
    """
    if length is None:
        before, after = _silence(rng, style.edge), _silence(rng, style.edge)
    else:
        spare = length - len(speech)
        split = int(rng.integers(spare + 1))
        before, after = np.zeros(split, np.float32), np.zeros(spare - split, np.float32)
    samples = np.concatenate([before, speech, after])
    noise = _noise(rng, len(samples), rng.uniform(*style.slope))
    noisy = samples + noise * _rms(speech) / _gain(rng, style.noise)
    recorded: Floats = noisy * (_gain(rng, style.peak) / np.abs(noisy).max())
    return recorded


def held_out_string(voices: Sequence[Voice], number: int, *, seed: int) -> DigitString:
    """String `number` of the test set: the speakers take turns, and no string depends on others."""
    rng = np.random.default_rng([seed, number])
    spoken = draw(rng, voices[number % len(voices)], TEST)
    return replace(spoken, samples=record(rng, spoken.samples, TEST))


def write_strings(folder: Path, strings: Iterable[DigitString]) -> None:
    """Write 16-bit FLAC files and, last of all, `manifest.json`; speakers are its splits.

    Raises:
        IntqError: A file cannot be written.
    """
    check_output(folder)
    folder.mkdir(exist_ok=True)
    lines: list[str] = []
    for number, string in enumerate(strings):
        name = f"{number:03d}_{string.speaker}.flac"
        write_atomically(folder / name, partial(_write_audio, string.samples))
        entry = {
            "audio_filepath": name,
            "duration": round(len(string.samples) / RATE, 3),
            "text": string.text,
            "split": string.speaker,
        }
        lines.append(json.dumps(entry) + "\n")
    write_atomically(folder / "manifest.json", lambda target: target.write_text("".join(lines)))


def _write_audio(samples: Floats, path: Path) -> None:
    steps = np.round(samples * np.float32(2**15)).clip(-(2**15), 2**15 - 1)
    speech_package("soundfile").write(path, steps.astype(np.int16), RATE, subtype="PCM_16")


def _named(path: Path) -> tuple[int, str, int]:
    digit, _, rest = path.stem.partition("_")
    speaker, _, index = rest.rpartition("_")
    if not (digit.isdecimal() and speaker and index.isdecimal() and int(digit) < len(WORDS)):
        raise IntqError(f"{path}: expected a name <digit>_<speaker>_<index>.wav; remove the file")
    return int(digit), speaker, int(index)


def _even(path: Path) -> Floats:
    samples = read_audio(path, RATE)
    if not samples.any():
        raise IntqError(f"{path}: is silent; expected a spoken digit; remove the file")
    ramp = np.minimum(1, (np.arange(len(samples), dtype=np.float32) + 0.5) / FADE)
    faded: Floats = samples * ramp * ramp[::-1]
    return faded * np.float32(LEVEL / _rms(faded))


def _at_speed(samples: Floats, factor: float) -> Floats:
    if factor == 1:
        return samples
    resampled: Floats = speech_package("librosa").resample(
        samples, orig_sr=round(RATE * factor), target_sr=RATE, res_type="soxr_hq"
    )
    return resampled


def _silence(rng: np.random.Generator, seconds: Bounds) -> Floats:
    return np.zeros(int(rng.uniform(*seconds) * RATE), np.float32)


def _noise(rng: np.random.Generator, length: int, slope: float) -> Floats:
    """Noise of root mean square 1."""
    fast = 1 << (length - 1).bit_length()  # other transforms can be many times as slow
    spectrum = np.fft.rfft(rng.standard_normal(fast))
    spectrum[0] = 0
    spectrum[1:] *= np.arange(1, len(spectrum)) ** (-slope / 2)
    noise: Floats = np.fft.irfft(spectrum)[:length].astype(np.float32)
    return noise / _rms(noise)


def _gain(rng: np.random.Generator, decibels: Bounds) -> np.float32:
    return np.float32(10 ** (rng.uniform(*decibels) / 20))


def _rms(samples: Floats) -> np.float32:
    return np.float32(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
