"""What a model is trained on."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_intq import feeds
from onnx_intq.frontend import Frontend
from onnx_intq.graph import graph_from_model, load, metadata
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY
from onnx_intq.training_plan import Plan
from onnx_intq.training_source import TrainingSource, frames_in
from onnx_intq.transform import IntqError


def test_there_is_one_source(speech: Path) -> None:
    with pytest.raises(IntqError, match="neither --manifest nor --data given; expected"):
        TrainingSource()
    with pytest.raises(IntqError, match="both of them given; expected"):
        TrainingSource(manifest=speech, data=speech)


def test_speech_is_left_out_or_cropped_where_it_is_too_long(tiny: Path, speech: Path) -> None:
    graph, source = load(tiny), TrainingSource(manifest=speech)
    everything, left = source.samples(graph, Plan())
    assert [s.frames for s in everything] == [50, 55]
    assert left == 0
    assert source.longest(graph, Plan(seconds=0.52)) is None
    kept, left = source.samples(graph, Plan(seconds=0.52))
    assert [s.frames for s in kept] == [50]
    assert left == 1
    cropped = Plan(seconds=0.52, task=0)
    found, left = source.samples(graph, cropped)
    assert [s.targets for s in found] == [None, None]
    assert (left, source.longest(graph, cropped)) == (0, 52)
    with pytest.raises(IntqError, match=r"every utterance is longer than 0\.1 s; expected"):
        source.samples(graph, Plan(seconds=0.1))
    assert frames_in(1e-9, Frontend()) == 1


def test_settings_come_from_the_model_or_are_given(tiny: Path, speech: Path) -> None:
    graph = load(tiny)
    del metadata(graph)[FRONTEND_KEY], metadata(graph)[LABELS_KEY]
    with pytest.raises(IntqError, match="does not record its labels"):
        TrainingSource(manifest=speech).known_labels(graph)
    with pytest.raises(IntqError, match="does not record its frontend"):
        TrainingSource(manifest=speech).samples(graph, Plan())
    known = Frontend(sample_rate=8000, features=4)
    given = TrainingSource(manifest=speech, labels="a ", frontend=known)
    assert len(given.samples(graph, Plan())[0]) == 2
    assert given.longest(graph, Plan(task=0, seconds=1)) == 100


def test_feeds_are_cut_into_rows(tiny: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    batches = [
        {"audio_signal": random.standard_normal((n, 4, 9)).astype(np.float32)} for n in (3, 1)
    ]
    feeds.write(tmp_path / "f.npz", batches)
    source = TrainingSource(data=tmp_path / "f.npz")
    found, left = source.samples(load(tiny), Plan())
    assert [(s.rows, s.frames, s.joins) for s in found] == [(1, 9, True)] * 3 + [(1, 9, False)]
    assert left == 0
    assert source.longest(load(tiny), Plan(task=0)) is None
    assert source.fingerprint() == feeds.fingerprint(tmp_path / "f.npz")


def test_feeds_that_cannot_be_cut_stay_whole(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x, float s) => (float[n, 4] y) { c = CumSum(x, zero) y = Mul(c, s) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int64), "zero"))
    batch = {"x": np.ones((3, 4), np.float32), "s": np.array(2, np.float32)}
    feeds.write(tmp_path / "f.npz", [batch])
    ((only,), _) = TrainingSource(data=tmp_path / "f.npz").samples(graph_from_model(model), Plan())
    assert (only.rows, only.joins) == (3, False)


def test_data_that_is_speech_is_refused(tiny: Path, speech: Path) -> None:
    with pytest.raises(IntqError, match="is speech"):
        TrainingSource(data=speech).samples(load(tiny), Plan())
