import json
import sys
from collections.abc import Mapping
from typing import Any

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.frontend import FixedNormalization, Floats, Frontend, log_mel
from onnx_intq.transform import IntqError

CONFORMER = Frontend(features=80, window_size=0.025, n_fft=512)
VARIANTS = (
    Frontend(),
    CONFORMER,
    Frontend(normalize="all_features", window="hamming"),
    Frontend(normalize=None, preemphasis=None, window="blackman"),
    Frontend(features=2, normalize=FixedNormalization(fixed_mean=(-9, 1.5), fixed_std=(2, 0.5))),
    Frontend(sample_rate=8000, features=40, lowfreq=60, highfreq=3800, window="bartlett"),
    Frontend(log_zero_guard_type="clamp", mel_norm=None, log_zero_guard_value=1e-5),
)
WINDOWS = {
    "hann": torch.hann_window,
    "hamming": torch.hamming_window,
    "blackman": torch.blackman_window,
    "bartlett": torch.bartlett_window,
}


def noise(samples: int, seed: int = 0) -> Floats:
    random = np.random.default_rng(seed)
    return (0.1 * random.standard_normal(samples)).astype(np.float32)


def by_torch(samples: Floats, frontend: Frontend) -> Floats:
    """The same features in float64 by torch, as the preprocessor's definition reads."""
    x = torch.tensor(samples).double()
    if frontend.preemphasis is not None:
        x = torch.cat([x[:1], x[1:] - frontend.preemphasis * x[:-1]])
    spectrum = torch.stft(
        x,
        n_fft=frontend.fft_length,
        hop_length=frontend.hop_length,
        win_length=frontend.win_length,
        window=WINDOWS[frontend.window](frontend.win_length, periodic=False, dtype=torch.float64),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    filters = librosa.filters.mel(
        sr=frontend.sample_rate,
        n_fft=frontend.fft_length,
        n_mels=frontend.features,
        fmin=frontend.lowfreq,
        fmax=frontend.highfreq,
        norm="slaney" if frontend.mel_norm else None,
    )
    mel = torch.tensor(filters).double() @ spectrum.abs().square()
    mel = mel[:, : len(samples) // frontend.hop_length]
    guard = frontend.log_zero_guard_value
    mel = (mel + guard if frontend.log_zero_guard_type == "add" else mel.clamp(min=guard)).log()
    if frontend.normalize == "per_feature":
        mel = (mel - mel.mean(1, keepdim=True)) / (mel.std(1, keepdim=True) + 1e-5)
    elif frontend.normalize == "all_features":
        mel = (mel - mel.mean()) / (mel.std() + 1e-5)
    elif isinstance(frontend.normalize, FixedNormalization):
        mean, std = frontend.normalize.fixed_mean, frontend.normalize.fixed_std
        mel = (mel - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
    return np.asarray(mel.numpy(), np.float32)


@pytest.mark.parametrize("frontend", VARIANTS)
@pytest.mark.parametrize("samples", [4000, 4001, 4159, 321])
def test_features_equal_the_definition_in_float64(frontend: Frontend, samples: int) -> None:
    audio = noise(samples)
    found = log_mel(audio, frontend)
    assert found.dtype == np.float32
    assert found.shape == (frontend.features, samples // frontend.hop_length)
    # A float32 transform of N points errs by about eps * log2(N) relative to its largest value;
    # the logarithm and the division by a deviation below 1 enlarge that for the weakest bands.
    tolerance = 100 * np.finfo(np.float32).eps * np.log2(frontend.fft_length)
    np.testing.assert_allclose(found, by_torch(audio, frontend), rtol=0, atol=tolerance)


@pytest.mark.parametrize("normalize", ["per_feature", "all_features"])
def test_silence_and_a_single_frame_give_zeros(normalize: str) -> None:
    frontend = Frontend(normalize=normalize)
    assert not log_mel(np.zeros(1600, np.float32), frontend).any()
    assert not log_mel(noise(161), Frontend()).any()


@settings(derandomize=True, deadline=None, max_examples=20)
@given(frames=st.integers(2, 60), seed=st.integers(0, 9))
def test_each_band_is_normalized_over_its_frames(frames: int, seed: int) -> None:
    audio = noise(160 * frames, seed)
    features = log_mel(audio, Frontend()).astype(np.float64)
    raw = log_mel(audio, Frontend(normalize=None)).astype(np.float64).std(axis=1, ddof=1)
    # Features are rounded to float32 once, after normalization in float64.
    rounding = np.abs(features).max() * np.finfo(np.float32).eps
    np.testing.assert_allclose(features.mean(axis=1), 0, atol=rounding)
    np.testing.assert_allclose(features.std(axis=1, ddof=1), raw / (raw + 1e-5), atol=rounding)


def test_audio_shorter_than_a_frame_is_refused() -> None:
    with pytest.raises(IntqError, match="159 samples; expected at least one frame of 160"):
        log_mel(noise(159), Frontend())


def test_lengths_are_those_of_nemo() -> None:
    assert (Frontend().win_length, Frontend().hop_length, Frontend().fft_length) == (320, 160, 512)
    assert (CONFORMER.win_length, CONFORMER.fft_length) == (400, 512)
    assert Frontend(window_size=0.032).fft_length == 512
    assert Frontend(sample_rate=22050, window_size=0.025).win_length == 551


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    st.builds(
        Frontend,
        sample_rate=st.integers(8000, 48000),
        window=st.sampled_from(sorted(WINDOWS)),
        n_fft=st.none() | st.integers(2048, 4096),
        features=st.integers(1, 128),
        lowfreq=st.floats(0, 100),
        highfreq=st.none() | st.floats(200, 4000),
        preemphasis=st.none() | st.floats(0, 1),
        mel_norm=st.sampled_from([None, "slaney"]),
        log_zero_guard_type=st.sampled_from(["add", "clamp"]),
        log_zero_guard_value=st.floats(1e-30, 1),
        normalize=st.sampled_from([None, "per_feature", "all_features"]),
    )
)
def test_json_reads_back(frontend: Frontend) -> None:
    assert Frontend.from_json(frontend.to_json()) == frontend


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(1e-3, 9)), min_size=1, max_size=4))
def test_fixed_values_read_back(values: list[tuple[float, float]]) -> None:
    mean, std = zip(*values, strict=True)
    fixed = FixedNormalization(fixed_mean=mean, fixed_std=std)
    frontend = Frontend(features=len(values), normalize=fixed)
    assert Frontend.from_json(frontend.to_json()) == frontend
    assert hash(frontend) == hash(Frontend(features=len(values), normalize=fixed))


def test_with_fixed_values_no_frame_depends_on_a_later_one() -> None:
    frontend = VARIANTS[4]
    assert isinstance(frontend.normalize, FixedNormalization)
    audio, frames = noise(4000), 10  # the last of these frames ends before sample 2000
    later = np.concatenate([audio[:2000], 5 * audio[2000:]])
    one, other = (log_mel(each, frontend)[:, :frames] for each in (audio, later))
    assert np.array_equal(one, other)


def test_a_nemo_section_is_understood() -> None:
    section = {
        "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
        "window_size": 0.025,
        "features": 80,
        "n_fft": 512,
        "normalize": "per_feature",
        "preemph": 0.97,
        "frame_splicing": 1,
        "dither": 1e-05,
        "pad_to": 0,
    }
    assert Frontend.from_settings(section) == CONFORMER
    assert Frontend.from_settings({"normalize": "NA"}).normalize is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hop": 160}, "no setting 'hop'; expected some of: features, highfreq"),
        ({"frame_splicing": 2}, "frame_splicing is 2; expected 1, the only one supported"),
        ({"n_window_size": 320}, "n_window_size is 320; expected None"),
        ({"sample_rate": "16000"}, "sample_rate is '16000'; expected int"),
        ({"sample_rate": True}, "sample_rate is True; expected int"),
        ({"sample_rate": 0}, "sample_rate is 0; expected a rate above 0 Hz"),
        ({"preemph": float("nan")}, "preemphasis is nan; expected float | null"),
        ({"window": "kaiser"}, "window is 'kaiser'; expected one of hann"),
        ({"window_size": 1e-5}, "window_size is 1e-05; expected at least one sample"),
        ({"window_stride": 0.0}, "window_stride is 0.0; expected at least one sample"),
        ({"n_fft": 256}, "n_fft is 256; expected no less than the window"),
        ({"features": 0}, "features is 0; expected at least 1"),
        ({"lowfreq": 8000}, "lowfreq is 8000; expected 0 or more and below 8000 Hz"),
        ({"highfreq": 9000}, "highfreq is 9000; expected at most half the sample rate, 8000 Hz"),
        ({"mel_norm": "htk"}, "mel_norm is 'htk'; expected slaney or null"),
        ({"log_zero_guard_type": "max"}, "log_zero_guard_type is 'max'; expected add or clamp"),
        ({"log_zero_guard_value": 0}, "log_zero_guard_value is 0; expected a value above 0"),
        ({"log_zero_guard_value": "tiny"}, "log_zero_guard_value is 'tiny'; expected float"),
        ({"normalize": {"fixed_mean": [0]}}, "expected lists fixed_mean and fixed_std; correct"),
        ({"normalize": {"mean": [0], "fixed_std": [1]}}, "expected lists fixed_mean and fixed_std"),
        ({"normalize": {"fixed_mean": 0, "fixed_std": 1}}, "expected lists fixed_mean and fixed_s"),
        ({"normalize": {"fixed_mean": [0], "fixed_std": [1]}, "features": 2}, "fixed values or nu"),
        ({"normalize": {"fixed_mean": [0], "fixed_std": [0]}}, "numbers, as many of each, deviat"),
        ({"normalize": {"fixed_mean": [0], "fixed_std": [1, 1]}}, "numbers, as many of each"),
        ({"normalize": {"fixed_mean": [], "fixed_std": []}}, "numbers, as many of each"),
        ({"normalize": {"fixed_mean": ["0"], "fixed_std": [1]}}, "numbers, as many of each"),
        ({"normalize": {"fixed_mean": [0], "fixed_std": [float("inf")]}}, "numbers, as many of"),
        ({"normalize": "fixed"}, "normalize is 'fixed'; expected per_feature, all_features"),
    ],
)
def test_wrong_settings_are_named(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(IntqError) as caught:
        Frontend.from_settings(settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", json.dumps([1]), "null"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(IntqError, match="front end is"):
        Frontend.from_json(text)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(IntqError, match=r"run: pip install 'onnx_intq\[speech\]'"):
        log_mel(noise(1600), Frontend())
