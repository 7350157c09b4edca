"""An RNN-T's graphs as functions, and graphs that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_intq.lowering import GRIDS_KEY
from onnx_intq.transducer import LONGEST_STACK, States, Transducer, joined
from onnx_intq.transform import IntqError


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def edited(folder: Path, part: str, edit: Callable[[onnx.ModelProto], object]) -> Path:
    """The folder with a file changed."""
    path = folder / f"{part}.onnx"
    model = onnx.load(path)
    edit(model)
    onnx.save(model, path)
    return folder


def replaced(folder: Path, part: str, text: str) -> Path:
    """The folder with another graph in place of a part."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    onnx.save(model, folder / f"{part}.onnx")
    return folder


def test_chunks_with_their_states_give_what_the_whole_gives(rnnt: Path) -> None:
    transducer, features = Transducer(rnnt, threads=1), noise(4, 20)
    whole, _ = transducer.encode(features, transducer.start("encoder"))
    states = transducer.start("encoder")
    parts = []
    for start in range(0, 20, 6):
        part, states = transducer.encode(features[:, start : start + 6], states)
        parts.append(part)
    assert whole.shape == (7, 8)
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-6)
    assert transducer.stack(4) == 3


def test_a_batch_gives_what_its_elements_give(rnnt: Path) -> None:
    transducer = Transducer(rnnt, threads=1)
    start = transducer.start("predictor")
    labels = np.array([0, 2, 1])
    predicted, after = transducer.predict(labels, joined([start] * 3))
    frame = noise(8)
    scores = transducer.log_probs(frame, predicted, 3)
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, rtol=1e-12)
    for row, label in enumerate(labels):
        alone, states = transducer.predict(np.array([label]), start)
        np.testing.assert_allclose(alone[0], predicted[row], rtol=0, atol=1e-6)
        np.testing.assert_allclose(states.h, after.row(row).h, rtol=0, atol=1e-6)
        np.testing.assert_allclose(states.c, after.row(row).c, rtol=0, atol=1e-6)
        own = transducer.log_probs(frame, alone, 3)
        np.testing.assert_allclose(own[0], scores[row], rtol=0, atol=1e-5)


def test_states_are_joined_and_taken_apart() -> None:
    states = [States(h=noise(2, 1, 3) + n, c=noise(2, 1, 3) - n) for n in range(3)]
    batch = joined(states)
    assert batch.h.shape == batch.c.shape == (2, 3, 3)
    assert np.array_equal(batch.row(1).h, states[1].h)
    assert np.array_equal(batch.row(2).c, states[2].c)


def test_integer_states_are_hidden(rnnt: Path) -> None:
    """A predictor that carries an int8 state: real values go in and come out."""
    text = """p (int64[b,1] label, int8[1,b,2] h, float[1,b,2] c)
        => (float[b,1,1] predicted, int8[1,b,2] h_out, float[1,b,2] c_out) {
            predicted = Cast<to = 1>(label) h_out = Identity(h) c_out = Identity(c) }"""
    replaced(rnnt, "predictor", text)
    grids = {name: ["int8", 0.5, 3] for name in ("h", "h_out")}

    def record(model: onnx.ModelProto) -> None:
        onnx.helper.set_model_props(model, {GRIDS_KEY: json.dumps(grids)})

    transducer = Transducer(edited(rnnt, "predictor", record), threads=1)
    start = transducer.start("predictor")
    assert start.h.dtype == np.float32
    states = States(h=np.array([[[1.5, -0.4]]], np.float32), c=start.c)
    _, after = transducer.predict(np.array([1]), states)
    assert after.h.tolist() == [[[1.5, -0.5]]]


def test_graphs_with_other_inputs_are_refused(rnnt: Path) -> None:
    replaced(
        rnnt,
        "joint",
        "j (float[b,t,8] encoded) => (float[b,t,8] logits) { logits = Identity(encoded) }",
    )
    with pytest.raises(IntqError, match=r"joint\.onnx: takes encoded; expected encoded, pred"):
        Transducer(rnnt)
    (rnnt / "joint.onnx").write_bytes(b"junk")
    with pytest.raises(IntqError, match=r"joint\.onnx: onnxruntime cannot load it"):
        Transducer(rnnt)


@pytest.mark.parametrize("shape", ["n,b,8", "b,8", "2,b,w"])
def test_states_of_unknown_size_are_refused(rnnt: Path, shape: str) -> None:
    text = f"""e (float[b,4,t] audio_signal, float[{shape}] h, float[2,b,8] c)
        => (float[b,4,t] encoded, float[{shape}] h_out, float[2,b,8] c_out) {{
            encoded = Identity(audio_signal) h_out = Identity(h) c_out = Identity(c) }}"""
    transducer = Transducer(replaced(rnnt, "encoder", text))
    with pytest.raises(IntqError, match=r"encoder\.onnx: takes h .*; expected states \[layers, ba"):
        transducer.start("encoder")


def test_states_that_come_out_otherwise_are_refused(rnnt: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        name = model.graph.output[1].name
        model.graph.output[1].name = "other"
        for node in model.graph.node:
            node.output[:] = ["other" if each == name else each for each in node.output]

    transducer = Transducer(edited(rnnt, "encoder", rename))
    with pytest.raises(IntqError, match=r"encoder\.onnx: no output 'h_out'; expected one of"):
        transducer.encode(noise(4, 6), transducer.start("encoder"))


def test_scores_of_other_classes_or_none_are_refused(rnnt: Path) -> None:
    transducer = Transducer(rnnt)
    predicted, _ = transducer.predict(np.array([2]), transducer.start("predictor"))
    with pytest.raises(IntqError, match=r"gives logits \[1, 1, 1, 3\]; expected .* 3 labels and"):
        transducer.log_probs(noise(8), predicted, 4)
    with pytest.raises(IntqError, match="gives NaN as scores; expected numbers"):
        transducer.log_probs(np.full(8, np.nan, np.float32), predicted, 3)
    with pytest.raises(IntqError, match=r"input 'encoded' has shape \[1, 1, 7\]; expected"):
        transducer.log_probs(noise(7), predicted, 3)


def test_an_encoder_without_bounds_cannot_work_in_chunks(rnnt: Path) -> None:
    text = """e (float[b,4,t] audio_signal, float[2,b,8] h, float[2,b,8] c)
        => (float[b,1,4] encoded, float[2,b,8] h_out, float[2,b,8] c_out)
        <int64[1] axes = {2}> {
            mean = ReduceMean<axes = [2]>(audio_signal)
            encoded = Transpose<perm = [0, 2, 1]>(mean) h_out = Identity(h) c_out = Identity(c) }"""
    transducer = Transducer(replaced(rnnt, "encoder", text))
    with pytest.raises(IntqError, match=f"joins more than {LONGEST_STACK} frames to one"):
        transducer.stack(4)
