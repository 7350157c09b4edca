import hashlib
import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.feeds import (
    SPEECH_INPUTS,
    Batch,
    Feeds,
    TensorSpec,
    check,
    fingerprint,
    read,
    speech_batch,
    write,
)
from onnx_intq.frontend import Frontend
from onnx_intq.transform import IntqError

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)
SIGNAL = TensorSpec(name="audio_signal", dtype=FLOAT, shape=("batch", 64, None))
LENGTH = TensorSpec(name="length", dtype=INT, shape=("batch",))


def numbered(*numbers: int) -> list[Batch]:
    return [{"x": np.full((1, 3), number, np.float32)} for number in numbers]


def values(feeds: Feeds) -> list[float]:
    return [float(batch["x"][0, 0]) for batch in feeds]


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A manifest of two utterances of noise, 0.1 s and 0.2 s."""
    random = np.random.default_rng(0)
    for number in (1, 2):
        noise = 0.1 * random.standard_normal(1600 * number)
        soundfile.write(tmp_path / f"{number}.flac", noise, 16000)
    path = tmp_path / "manifest.json"
    path.write_text("\n".join(json.dumps({"audio_filepath": f"{n}.flac"}) for n in (2, 1)))
    return path


def test_feeds_can_be_read_again(tmp_path: Path) -> None:
    write(tmp_path / "f.npz", numbered(1, 2, 3))
    feeds = read(tmp_path / "f.npz")
    assert len(feeds) == 3
    assert values(feeds) == values(feeds) == [1, 2, 3]
    assert values(read(tmp_path / "f.npz", limit=2)) == [1, 2]


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b.npz", numbered(3))
    write(tmp_path / "a.npz", numbered(1, 2))
    (tmp_path / "notes.txt").touch()
    assert values(read(tmp_path)) == [1, 2, 3]
    write(tmp_path / "c.npz", [{"y": np.ones(1)}])
    with pytest.raises(IntqError, match=r"c\.npz: batch 0000 holds y; expected x as in .*a\.npz"):
        read(tmp_path)


def test_an_archive_is_known_by_its_content(tmp_path: Path) -> None:
    write(tmp_path / "feeds", numbered(1))
    assert values(read(tmp_path / "feeds")) == [1]


@settings(derandomize=True, deadline=None, max_examples=20)
@given(count=st.integers(1, 6), ranks=st.integers(1, 4))
def test_the_shares_together_are_the_feeds(
    tmp_path_factory: pytest.TempPathFactory, count: int, ranks: int
) -> None:
    path = tmp_path_factory.mktemp("feeds") / "f.npz"
    write(path, numbered(*range(count)))
    shares = [values(read(path).share(rank, ranks)) for rank in range(ranks)]
    assert sorted(itertools.chain(*shares)) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_memory_does_not_grow_with_the_number_of_batches(tmp_path: Path) -> None:
    size = 1 << 20
    write(tmp_path / "f.npz", ({"x": np.zeros(size, np.uint8)} for _ in range(20)))
    tracemalloc.start()
    assert sum(len(batch["x"]) for batch in read(tmp_path / "f.npz")) == 20 * size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * size  # one batch held, one being read, the check's mask


def test_speech_becomes_batches_of_one(speech: Path) -> None:
    feeds = read(speech, frontend=Frontend())
    assert len(feeds) == 2
    shapes = [(b["audio_signal"].shape, b["length"].tolist()) for b in feeds]
    assert shapes == [((1, 64, 20), [20]), ((1, 64, 10), [10])]
    (batch,) = feeds.share(1, 2)
    assert list(batch) == ["audio_signal", "length"]
    (only,) = read(speech.parent, frontend=Frontend(), inputs=[SIGNAL], limit=1)
    assert list(only) == ["audio_signal"]
    np.testing.assert_array_equal(only["audio_signal"], batch["audio_signal"])


def test_speech_needs_a_front_end(speech: Path) -> None:
    with pytest.raises(IntqError, match=r"manifest\.json: is speech, .*; give --frontend"):
        read(speech)


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_must_leave_something(tmp_path: Path, limit: int) -> None:
    with pytest.raises(IntqError, match=f"limit {limit}; expected at least 1"):
        read(tmp_path, limit=limit)


def test_missing_and_empty_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match=r"nowhere: no such file or folder; expected \.npz"):
        read(tmp_path / "nowhere")
    (tmp_path / "f.npz").write_text("text")
    with pytest.raises(IntqError, match=r"f\.npz: not an .npz file"):
        read(tmp_path / "f.npz")
    (tmp_path / "f.npz").unlink()
    with pytest.raises(IntqError, match="holds no utterances"):
        read(tmp_path)


def test_fingerprints_tell_the_data_not_the_place(tmp_path: Path, speech: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{name}.npz", numbered(1))
    file = tmp_path / "a" / "a.npz"
    assert fingerprint(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") != fingerprint(file)
    before = fingerprint(speech), fingerprint(speech.parent)
    assert before == (fingerprint(speech), fingerprint(speech.parent))
    assert len({*before, fingerprint(tmp_path / "a")}) == 3
    soundfile.write(tmp_path / "1.flac", np.zeros(1600), 16000)
    assert fingerprint(speech) != before[0]
    assert fingerprint(speech.parent) != before[1]


def batch(**changes: np.ndarray) -> Batch:
    return {"audio_signal": np.zeros((2, 64, 9), FLOAT), "length": np.array([9, 4])} | changes


def test_a_fitting_batch_passes() -> None:
    check(batch(), [SIGNAL, LENGTH])
    unknown = TensorSpec(name="length", dtype=INT, shape=())
    check(batch(), [SIGNAL, unknown])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (batch(extra=np.ones(1)), "feeds hold 'extra', which the model does not take"),
        ({"length": np.array([1])}, "feeds lack input 'audio_signal'"),
        (batch(length=np.ones(2, np.int32)), "input 'length' is int32"),
        (batch(length=np.ones((2, 1), INT)), "input 'length' has shape [2, 1]"),
        (batch(audio_signal=np.zeros((2, 80, 9), FLOAT)), "has shape [2, 80, 9]"),
    ],
)
def test_misfits_are_named_with_what_the_model_takes(given: Batch, message: str) -> None:
    with pytest.raises(IntqError) as caught:
        check(given, [SIGNAL, LENGTH])
    assert message in str(caught.value)
    assert "audio_signal (float32 [batch, 64, ?]), length (int64 [batch])" in str(caught.value)


def test_utterances_are_padded_with_zeros() -> None:
    features = [np.ones((64, 3), np.float32), np.ones((64, 5), np.float32)]
    made = speech_batch(features, [SIGNAL, LENGTH])
    assert made["length"].tolist() == [3, 5]
    assert made["audio_signal"].shape == (2, 64, 5)
    assert made["audio_signal"].sum() == 64 * 8
    assert not made["audio_signal"][0, :, 3:].any()


def test_models_that_take_no_features_are_refused() -> None:
    waves = TensorSpec(name="wave", dtype=FLOAT, shape=("batch", "samples"))
    with pytest.raises(IntqError, match=r"model takes wave \(float32 \[batch, samples\]\)"):
        speech_batch([np.ones((64, 3), np.float32)], [waves])
    with pytest.raises(IntqError, match=r"shape \[1, 80, 3\]; expected audio_signal"):
        speech_batch([np.ones((80, 3), np.float32)], [SIGNAL])
    speech_batch([np.ones((80, 3), np.float32)], SPEECH_INPUTS)
