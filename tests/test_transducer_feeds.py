"""Feeds of an RNN-T's graphs: what went through them while they decoded."""

from pathlib import Path

import numpy as np
import pytest

from onnx_intq.feeds import Batch, check, read
from onnx_intq.frontend import Frontend
from onnx_intq.graph import load
from onnx_intq.manifest import read_manifest
from onnx_intq.runtime import Session
from onnx_intq.samples import specs
from onnx_intq.speech import FRONTEND_KEY, features_of
from onnx_intq.transducer_feeds import CHUNK, CORRELATION, Recorder, recorded_feeds, smooth
from onnx_intq.transducer_folder import part_paths
from onnx_intq.transducer_recognizer import TransducerRecognizer
from onnx_intq.transform import IntqError

STACK = 3
"""Frames that the encoder of the fixture joins to one."""


def feeds(folder: Path, data: Path | None, **options: int) -> dict[str, list[Batch]]:
    with recorded_feeds(folder, data, **options) as places:  # type: ignore[arg-type]
        found = {part: list(read(path)) for part, path in places.items()}
    assert not any(path.exists() for path in places.values())
    return found


def same(a: dict[str, list[Batch]], b: dict[str, list[Batch]]) -> bool:
    pairs = [(x, y) for part in a for x, y in zip(a[part], b[part], strict=True)]
    return all(np.array_equal(x[name], y[name]) for x, y in pairs for name in x)


def test_every_graph_takes_its_feeds(rnnt: Path, speech: Path) -> None:
    for data in (speech, None):
        for part, batches in feeds(rnnt, data).items():
            assert batches
            for batch in batches:
                check(batch, specs(load(part_paths(rnnt)[part])))


def test_the_chunks_are_the_utterances_with_the_states_between(rnnt: Path, speech: Path) -> None:
    recognizer, session = TransducerRecognizer(rnnt), Session(str(rnnt / "encoder.onnx"))
    chunks = iter(feeds(rnnt, speech)["encoder"])
    for utterance in read_manifest(speech):
        features = features_of(utterance, recognizer.frontend)
        h = c = np.zeros((2, 1, 8), np.float32)
        for start in range(0, features.shape[1], CHUNK * STACK):
            found = next(chunks)
            part = features[np.newaxis, :, start : start + CHUNK * STACK]
            assert np.array_equal(found["audio_signal"], part)
            assert np.array_equal(found["h"], h)
            assert np.array_equal(found["c"], c)
            after = session.run(found)
            h, c = after["h_out"], after["c_out"]
    assert next(chunks, None) is None


def test_the_labels_are_those_of_greedy_search(rnnt: Path, speech: Path) -> None:
    recognizer = TransducerRecognizer(rnnt)
    texts = recognizer.transcribe(
        [features_of(each, recognizer.frontend) for each in read_manifest(speech)]
    )
    assert any(texts)  # of noise, in labels that are any
    for text, batch in zip(texts, feeds(rnnt, speech)["predictor"], strict=True):
        first, *labels = batch["label"][:, 0]
        assert first == 2  # the blank
        assert "".join(recognizer.labels[label] for label in labels) == text
        assert np.array_equal(batch["h"][:, 0], np.zeros((2, 6)))
        assert np.abs(batch["h"][:, 1:]).min(initial=1.0) > 0


def test_noise_is_the_same_for_the_same_seed(rnnt: Path) -> None:
    assert same(feeds(rnnt, None, seed=1), feeds(rnnt, None, seed=1))
    assert not same(feeds(rnnt, None, seed=1), feeds(rnnt, None, seed=2))


def test_noise_is_smooth() -> None:
    values = smooth(np.random.default_rng(0), (64, 20_000))
    assert values.std() == pytest.approx(1.0, abs=0.05)
    for axis in (0, 1):
        moved = np.moveaxis(values, axis, 0)
        found = np.corrcoef(moved[1:].ravel(), moved[:-1].ravel())[0, 1]
        assert found == pytest.approx(CORRELATION, abs=0.03)


def test_progress_is_told(rnnt: Path, speech: Path) -> None:
    told: list[tuple[int, int]] = []
    with recorded_feeds(rnnt, speech, progress=lambda done, total: told.append((done, total))):
        assert told == [(1, 2), (2, 2)]


def test_a_front_end_may_be_given(rnnt: Path, speech: Path) -> None:
    frontend = Frontend(sample_rate=8000, features=4, normalize=None)
    with recorded_feeds(rnnt, speech, frontend=frontend) as places:
        first = next(iter(read(places["encoder"])))
    want = features_of(read_manifest(speech)[0], frontend)
    assert np.array_equal(first["audio_signal"][0], want[:, : CHUNK * STACK])


def test_labels_must_be_recorded(rnnt: Path) -> None:
    import onnx

    model = onnx.load(rnnt / "encoder.onnx")
    kept = [p for p in model.metadata_props if p.key == FRONTEND_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, rnnt / "encoder.onnx")
    with pytest.raises(IntqError, match="does not record its labels"):
        feeds(rnnt, None)


def test_data_that_is_not_there(rnnt: Path, tmp_path: Path) -> None:
    with pytest.raises(IntqError, match=r"none.json: .*No such file"):
        feeds(rnnt, tmp_path / "none.json")


def test_what_a_recorder_gives_is_what_a_transducer_gives(rnnt: Path) -> None:
    recorder = Recorder(rnnt)
    assert (recorder.classes(), recorder.features()) == (3, 4)
    states = recorder.start("predictor")
    predicted, _ = recorder.predict(np.array([2]), states)
    scores = recorder.log_probs(np.zeros(8, np.float32), predicted, 3)
    assert np.exp(scores).sum() == pytest.approx(1.0)
    batches = recorder.batches()
    assert batches["joint"][0]["predicted"].tolist() == predicted.tolist()
    assert batches["encoder"] == []
