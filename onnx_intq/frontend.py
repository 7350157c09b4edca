"""Log-mel front end: speech samples in, normalized features out, as in NeMo at inference.

Source: `AudioToMelSpectrogramPreprocessor` and `FilterbankFeatures` of NeMo 3.0. Law: one utterance
gives what NeMo gives for its valid frames, whether alone or in a padded batch.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from functools import cached_property
from types import ModuleType
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt

from onnx_intq.graph import first_line
from onnx_intq.transform import IntqError

STD_GUARD = 1e-5
"""Added to the standard deviation in normalization, so that silence gives zeros."""
NORMALIZE = frozenset({"per_feature", "all_features", None})
Floats = npt.NDArray[np.float32]
Window = Callable[[int], npt.NDArray[np.float64]]

WINDOWS: Mapping[str, Window] = {
    "hann": np.hanning,
    "hamming": np.hamming,
    "blackman": np.blackman,
    "bartlett": np.bartlett,
}
"""Symmetric (not periodic) windows by NeMo's names."""
RENAMED: Mapping[str, str] = {"preemph": "preemphasis"}
"""NeMo's names where ours differ."""
FIXED: Mapping[str, object] = {
    "exact_pad": False,
    "frame_splicing": 1,
    "log": True,
    "mag_power": 2.0,
    "n_window_size": None,
    "n_window_stride": None,
}
"""NeMo settings that are accepted only with these values."""
NO_EFFECT = frozenset(
    (
        *("dither", "nb_augmentation_prob", "nb_max_freq", "rng"),
        *("pad_to", "pad_value"),
        *("_target_", "cls", "stft_conv", "stft_exact_pad", "use_torchaudio"),
    )
)
"""NeMo settings without effect on one utterance at inference: training, padding, deprecated."""


@dataclass(frozen=True, kw_only=True)
class FixedNormalization:
    """Mean and deviation of each mel band, known beforehand: NeMo's `normalize` as a mapping.

    What a frame becomes then depends on no later one, as streaming needs.

    Raises:
        IntqError: They are not as many of each, no numbers, or a deviation is not above 0.
    """

    fixed_mean: tuple[float, ...]
    fixed_std: tuple[float, ...]

    def __post_init__(self) -> None:
        values = [*self.fixed_mean, *self.fixed_std]
        numbers = all(_is_finite(v) for v in values)
        as_many = len(self.fixed_mean) == len(self.fixed_std) > 0
        if not numbers or not as_many or min(self.fixed_std) <= 0:
            expected = "numbers, as many of each, deviations above 0"
            raise _invalid("normalize", asdict(self), expected)

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> FixedNormalization:
        """From a mapping with these two keys.

        Raises:
            IntqError: It has others, or they hold something else.
        """
        lists = {k: tuple(v) for k, v in settings.items() if isinstance(v, list | tuple)}
        if set(lists) != {"fixed_mean", "fixed_std"} or len(lists) != len(settings):
            raise _invalid("normalize", dict(settings), "lists fixed_mean and fixed_std")
        return cls(**lists)


@dataclass(frozen=True, kw_only=True)
class Frontend:
    """Settings of the front end; names (but `RENAMED`) and defaults of NeMo's preprocessor.

    Attributes:
        sample_rate: In Hz; audio at another rate is resampled.
        window_size: In seconds; the samples are rounded down.
        window_stride: In seconds between frames; the samples are rounded down.
        window: One of `WINDOWS`.
        n_fft: Length of the transform, None for the window's length rounded up to a power of two.
        features: Mel filters.
        lowfreq: Lower edge of the first filter, Hz.
        highfreq: Upper edge of the last filter, Hz; None for half the sample rate.
        preemphasis: Coefficient c of x[t] - c*x[t-1], None for none.
        mel_norm: "slaney" for filters of unit area, None for unit peak.
        log_zero_guard_type: Whether the guard is added before the logarithm or is a lower bound.
        log_zero_guard_value: The guard, in units of power.
        normalize: "per_feature" (each mel band to mean 0, deviation 1), "all_features", fixed means
            and deviations of each mel band, or None.

    Raises:
        IntqError: A setting has the wrong type or is out of range.
    """

    sample_rate: int = 16000
    window_size: float = 0.02
    window_stride: float = 0.01
    window: str = "hann"
    n_fft: int | None = None
    features: int = 64
    lowfreq: float = 0
    highfreq: float | None = None
    preemphasis: float | None = 0.97
    mel_norm: str | None = "slaney"
    log_zero_guard_type: str = "add"
    log_zero_guard_value: float = 2**-24
    normalize: str | FixedNormalization | None = "per_feature"

    def __post_init__(self) -> None:
        self._check_types()
        half = self.sample_rate / 2
        high = half if self.highfreq is None else self.highfreq
        for field, holds, expected in (
            ("sample_rate", self.sample_rate > 0, "a rate above 0 Hz"),
            ("window", self.window in WINDOWS, f"one of {', '.join(WINDOWS)}"),
            ("window_size", self.win_length >= 1, "at least one sample"),
            ("window_stride", self.hop_length >= 1, "at least one sample"),
            ("n_fft", self.fft_length >= self.win_length >= 1, "no less than the window"),
            ("features", self.features >= 1, "at least 1"),
            ("lowfreq", 0 <= self.lowfreq < high, f"0 or more and below {high:g} Hz"),
            ("highfreq", high <= half, f"at most half the sample rate, {half:g} Hz"),
            ("mel_norm", self.mel_norm in {"slaney", None}, "slaney or null"),
            ("log_zero_guard_type", self.log_zero_guard_type in {"add", "clamp"}, "add or clamp"),
            ("log_zero_guard_value", self.log_zero_guard_value > 0, "a value above 0"),
            ("normalize", self._normalizes(), "per_feature, all_features, fixed values or null"),
        ):
            if not holds:
                raise _invalid(field, getattr(self, field), expected)

    def _check_types(self) -> None:
        hints = get_type_hints(Frontend)
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            wanted = hint | int if isinstance(1.0, hint) else hint
            infinite = isinstance(value, float) and not math.isfinite(value)
            if infinite or isinstance(value, bool) or not isinstance(value, wanted):
                raise _invalid(field.name, value, str(field.type).replace("None", "null"))

    def _normalizes(self) -> bool:
        if isinstance(self.normalize, FixedNormalization):
            return len(self.normalize.fixed_mean) == self.features
        return self.normalize in NORMALIZE

    @property
    def win_length(self) -> int:
        """Floats per window."""
        return int(self.window_size * self.sample_rate)

    @property
    def hop_length(self) -> int:
        """Floats between frames."""
        return int(self.window_stride * self.sample_rate)

    @property
    def fft_length(self) -> int:
        """Floats per transform."""
        return self.n_fft or 1 << max(0, self.win_length - 1).bit_length()

    @cached_property
    def filters(self) -> Floats:
        """Mel filters, float32 [features, fft_length // 2 + 1]."""
        found: Floats = speech_package("librosa").filters.mel(
            sr=self.sample_rate,
            n_fft=self.fft_length,
            n_mels=self.features,
            fmin=self.lowfreq,
            fmax=self.highfreq,
            norm=self.mel_norm,
            dtype=np.float32,
        )
        return found

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> Frontend:
        """From a mapping such as the `preprocessor` section of a NeMo configuration.

        Raises:
            IntqError: A setting is unknown, not supported, or invalid.
        """
        known = {field.name for field in fields(cls)}
        chosen: dict[str, Any] = {}
        for given, value in settings.items():
            key = RENAMED.get(given, given)
            if key in known:
                chosen[key] = value
            elif key in FIXED and value != FIXED[key]:
                raise _invalid(key, value, f"{FIXED[key]!r}, the only one supported")
            elif key not in NO_EFFECT and key not in FIXED:
                expected = ", ".join(sorted(known))
                raise IntqError(f"front end has no setting {key!r}; expected some of: {expected}")
        if chosen.get("normalize") in ("NA", "", False):
            chosen["normalize"] = None
        if isinstance(fixed := chosen.get("normalize"), Mapping):
            chosen["normalize"] = FixedNormalization.from_settings(fixed)
        return cls(**chosen)

    @classmethod
    def from_json(cls, text: str) -> Frontend:
        """Read back what `to_json` wrote; law: `from_json(f.to_json()) == f`.

        Raises:
            IntqError: The text is no JSON object, or `from_settings` refuses it.
        """
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise IntqError(f"front end is not JSON ({error}); expected an object") from error
        if not isinstance(settings, dict):
            raise IntqError(f"front end is {text.strip()[:40]!r}; expected a JSON object")
        return cls.from_settings(settings)

    def to_json(self) -> str:
        """All settings as one line of JSON, sorted."""
        return json.dumps(asdict(self), sort_keys=True)


def log_mel(samples: Floats, frontend: Frontend) -> Floats:
    """Features of one utterance, float32 [features, frames]; frames = samples // hop_length.

    Pre-emphasis, centred STFT over zero padding, power, mel filters, guarded logarithm and
    normalization over these frames. NeMo computes one frame more and masks it: it is left out.

    Args:
        samples: float32 [samples], mono, at `frontend.sample_rate`, in [-1, 1].
        frontend: The settings.

    Raises:
        IntqError: The audio is shorter than one frame, or librosa is missing.
    """
    frames = len(samples) // frontend.hop_length
    if frames == 0:
        raise IntqError(
            f"audio has {len(samples)} samples; expected at least one frame of "
            f"{frontend.hop_length}; leave it out"
        )
    mel = frontend.filters @ _power_spectrum(_emphasize(samples, frontend.preemphasis), frontend)
    guard = np.float32(frontend.log_zero_guard_value)
    guarded = mel + guard if frontend.log_zero_guard_type == "add" else np.maximum(mel, guard)
    return _normalize(np.log(guarded)[:, :frames], frontend.normalize)


def speech_package(name: str) -> ModuleType:
    """Import a package of the extra `speech`.

    Raises:
        IntqError: It is missing or broken; the message names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise IntqError(
            f"cannot import {name} ({first_line(error)}); speech needs it; "
            "run: pip install 'onnx_intq[speech]'"
        ) from error


def _emphasize(samples: Floats, coefficient: float | None) -> Floats:
    if coefficient is None:
        return samples
    return np.concatenate([samples[:1], samples[1:] - np.float32(coefficient) * samples[:-1]])


def _power_spectrum(samples: Floats, frontend: Frontend) -> Floats:
    padded = np.pad(samples, frontend.fft_length // 2)
    spectrum = speech_package("librosa").stft(
        padded,
        n_fft=frontend.fft_length,
        hop_length=frontend.hop_length,
        win_length=frontend.win_length,
        window=WINDOWS[frontend.window](frontend.win_length),
        center=False,
    )
    power: Floats = np.square(spectrum.real) + np.square(spectrum.imag)
    return power


def _normalize(features: Floats, kind: str | FixedNormalization | None) -> Floats:
    if kind is None:
        return features
    if isinstance(kind, FixedNormalization):
        mean, std = (np.array(v, np.float32)[:, np.newaxis] for v in astuple(kind))
        scaled: Floats = (features - mean) / std
        return scaled
    axis = 1 if kind == "per_feature" else None
    count = features.shape[1] if kind == "per_feature" else features.size
    exact = features.astype(np.float64)
    exact -= exact.mean(axis=axis, keepdims=True)
    variance = np.square(exact).sum(axis=axis, keepdims=True) / max(1, count - 1)
    normalized: Floats = (exact / (np.sqrt(variance) + STD_GUARD)).astype(np.float32)
    return normalized


def _is_finite(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _invalid(setting: str, value: object, expected: str) -> IntqError:
    return IntqError(f"front end: {setting} is {value!r}; expected {expected}; correct the setting")
