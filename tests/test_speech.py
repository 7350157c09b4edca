import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.frontend import Frontend, log_mel
from onnx_intq.manifest import Utterance
from onnx_intq.speech import (
    features_of,
    greedy,
    labels_from_json,
    labels_to_json,
    read_audio,
    read_frontend,
    read_labels,
)
from onnx_intq.transform import IntqError

RATE = 16000


def tone(seconds: float, hertz: float, rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    """A second of 440 Hz, then one of 880 Hz, 16 kHz, stored exactly."""
    path = tmp_path / "tones.wav"
    soundfile.write(path, np.r_[tone(1, 440, RATE), tone(1, 880, RATE)], RATE, subtype="FLOAT")
    return path


def test_audio_is_read_as_stored(wav: Path) -> None:
    audio = read_audio(wav, RATE)
    assert audio.dtype == np.float32
    np.testing.assert_array_equal(
        audio, np.r_[tone(1, 440, RATE), tone(1, 880, RATE)].astype(np.float32)
    )
    np.testing.assert_array_equal(read_audio(wav, RATE, offset=0.5, duration=1), audio[8000:24000])
    np.testing.assert_array_equal(read_audio(wav, RATE, offset=1.5), audio[24000:])


def test_channels_are_averaged(tmp_path: Path) -> None:
    path = tmp_path / "stereo.flac"
    soundfile.write(path, np.array([[0.5, -0.25], [0.25, 0.25]]), RATE)
    np.testing.assert_array_equal(read_audio(path, RATE), np.array([0.125, 0.25], np.float32))


def test_other_rates_are_resampled(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(1, 440, 22050), 22050, subtype="FLOAT")
    audio = read_audio(path, RATE)
    assert audio.dtype == np.float32
    assert audio.shape == (RATE,)
    # Away from the ends the band-limited tone is the same; soxr's HQ stop band lies at -100 dB.
    inner = slice(1000, -1000)
    np.testing.assert_allclose(audio[inner], tone(1, 440, RATE)[inner], rtol=0, atol=1e-4)


def test_bad_audio_is_named(tmp_path: Path) -> None:
    for name, samples in (("nan", [0.0, np.nan]), ("infinite", [np.inf]), ("empty", [])):
        soundfile.write(tmp_path / f"{name}.wav", np.array(samples), RATE, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no audio")
    for name, message in (
        ("nan", "audio holds NaN or infinity"),
        ("infinite", "audio holds NaN or infinity"),
        ("empty", "holds no audio samples"),
        ("text", "not readable as audio"),
        ("missing", "no such file; expected audio"),
    ):
        with pytest.raises(IntqError, match=message) as caught:
            read_audio(tmp_path / f"{name}.wav", RATE)
        assert f"{name}.wav" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_audio_before_an_offset_beyond_the_end_is_none(wav: Path) -> None:
    with pytest.raises(IntqError, match=r"holds no audio samples \(from 3 s\)"):
        read_audio(wav, RATE, offset=3)


def test_features_come_from_the_utterance(wav: Path) -> None:
    second = Utterance(audio=wav, offset=1, duration=0.5)
    expected = log_mel(read_audio(wav, RATE)[16000:24000], Frontend())
    np.testing.assert_array_equal(features_of(second, Frontend()), expected)
    with pytest.raises(IntqError, match=r"tones\.wav: audio has 16 samples"):
        features_of(Utterance(audio=wav, duration=0.001), Frontend())


@settings(derandomize=True, deadline=None)
@given(path=st.lists(st.integers(0, 3), max_size=20), quantized=st.booleans())
def test_greedy_merges_repeats_then_drops_blanks(path: list[int], quantized: bool) -> None:
    dtype = np.int8 if quantized else np.float32
    log_probs = np.eye(4, dtype=dtype)[np.array(path, int)]
    merged = [label for label, _ in itertools.groupby(path)]
    assert greedy(log_probs, "ab ") == "".join("ab "[label] for label in merged if label < 3)


def test_sentencepiece_labels_give_words() -> None:
    pieces = ("\u2581he", "llo", "\u2581you")
    assert greedy(np.eye(4)[[0, 3, 1, 1, 2]], pieces) == " hello you"


@settings(derandomize=True, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1).map(tuple))
def test_labels_read_back(labels: tuple[str, ...]) -> None:
    assert labels_from_json(labels_to_json(labels)) == labels


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", '"ab"'])
def test_other_labels_are_refused(text: str) -> None:
    with pytest.raises(IntqError, match=r"expected a (JSON )?list of strings"):
        labels_from_json(text)


def test_labels_and_front_ends_are_read_from_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ('[" ", "a", "b"]', " \na\nb\n", " \r\na\r\nb\r\n"):
        path.write_bytes(text.encode())
        assert read_labels(path) == (" ", "a", "b")
    path.write_text('{"preemph": null, "features": 80}')
    assert read_frontend(path) == Frontend(preemphasis=None, features=80)


def test_bad_files_of_labels_and_front_ends_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(IntqError, match=r"file: cannot be read \(No such file or directory\)"):
        read_labels(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(IntqError, match=r"file: cannot be read \(not UTF-8 text\)"):
        read_frontend(path)
    path.write_text("\n")
    with pytest.raises(IntqError, match="file: is empty"):
        read_labels(path)
    path.write_text("[1]")
    with pytest.raises(IntqError, match="file: labels are"):
        read_labels(path)
    with pytest.raises(IntqError, match="file: front end is"):
        read_frontend(path)
