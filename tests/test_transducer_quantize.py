"""An RNN-T's folder quantized, checked and counted, by its functions and on the command line."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_intq.graph import load
from onnx_intq.integer_only import prove
from onnx_intq.intervals import bounds
from onnx_intq.progress import bar
from onnx_intq.recipes import pipeline
from onnx_intq.runtime import saturates
from onnx_intq.source import Source
from onnx_intq.summary import Summary
from onnx_intq.transducer import Transducer
from onnx_intq.transducer_folder import PARTS
from onnx_intq.transducer_quantize import quantize_folder
from onnx_intq.transform import CheckFailed, IntqError, Pass

Command = Callable[..., tuple[int, str, str]]
VNNI = pytest.mark.skipif(saturates(), reason="this processor has no VNNI")


def quantized(folder: Path, data: Path | None, target: str = "integer", **options: Any) -> Any:
    """Name and summaries of a quantized folder beside `folder`."""
    output = folder.with_name(f"{folder.name}-{target}")

    def passes(_: Path) -> Sequence[Pass]:
        return pipeline(target, **options)

    done = quantize_folder(folder, output, passes, Source(data=data), bar=bar)
    assert set(done) == set(PARTS)
    return output, done


def states(folder: Path, chunks: Sequence[Any]) -> tuple[Any, Any]:
    """The encoder's frames for chunks of features, and its last states."""
    net = Transducer(folder)
    now, frames = net.start("encoder"), []
    for chunk in chunks:
        encoded, now = net.encode(chunk, now)
        frames.append(encoded)
    return np.concatenate(frames), now


@pytest.mark.slow
@pytest.mark.parametrize("nonlinear", ["poly", "lut"])
def test_integers(rnnt: Path, speech: Path, nonlinear: str) -> None:
    output, done = quantized(rnnt, speech, nonlinear=nonlinear)
    assert all(isinstance(each, Summary) and each.integer_only == () for each in done.values())
    for part in PARTS:
        graph = load(output / f"{part}.onnx")
        assert prove(graph) == []
        assert bounds(graph).risks == ()
    features = np.random.default_rng(0).standard_normal((4, 180)).astype(np.float32)
    parts = [features[:, start : start + 30] for start in range(0, 180, 30)]
    whole, last = states(output, [features])
    cut, after = states(output, parts)
    assert np.array_equal(whole, cut)  # feeding states back is exact
    assert np.array_equal(last.h, after.h)
    assert np.array_equal(last.c, after.c)
    want = states(rnnt, [features])[0]
    assert np.sqrt(np.square(whole - want).mean() / np.square(want).mean()) < 0.06


@pytest.mark.slow
def test_integers_in_and_out(rnnt: Path, speech: Path) -> None:
    """The states that go in mean what those that come out mean."""
    output, _ = quantized(rnnt, speech, io="int8")
    grids = json.loads(load(output / "encoder.onnx").intq_metadata["onnx_intq.grids"])
    assert grids["h"][1:] == grids["h_out"][1:]
    assert grids["c"][1:] == grids["c_out"][1:]
    model = onnx.load(output / "encoder.onnx")
    types = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)
    }
    assert types["h"] == types["h_out"] == onnx.TensorProto.UINT8
    assert types["c"] == types["c_out"] == onnx.TensorProto.INT16


@pytest.mark.slow
def test_without_data(rnnt: Path) -> None:
    output, done = quantized(rnnt, None, "ort")
    assert done["encoder"].quantized == {"Conv": 1, "LSTM": 2}
    assert done["predictor"].quantized == {"LSTM": 2}
    assert done["joint"].quantized["MatMul"] == 3
    features = np.random.default_rng(0).standard_normal((4, 60)).astype(np.float32)
    want, have = (states(folder, [features])[0] for folder in (rnnt, output))
    assert np.sqrt(np.square(have - want).mean() / np.square(want).mean()) < 0.06


def test_ranges_are_of_one_graph(rnnt: Path, tmp_path: Path) -> None:
    with pytest.raises(IntqError, match=r"r.json for an RNN-T, which has three graphs"):
        quantize_folder(
            rnnt, tmp_path / "q", lambda _: [], Source(ranges=tmp_path / "r.json"), bar=bar
        )


def test_a_part_that_fails_is_named_and_nothing_is_written(rnnt: Path, tmp_path: Path) -> None:
    model = onnx.load(rnnt / "joint.onnx")
    for node in model.graph.node:
        if node.op_type == "Tanh":
            node.op_type = "Det"
    onnx.save(model, rnnt / "joint.onnx")
    with pytest.raises(IntqError, match=r"^joint.onnx: "):
        quantize_folder(rnnt, tmp_path / "q", lambda _: [], Source(), bar=bar)
    assert not (tmp_path / "q").exists()


def test_checks_that_fail_keep_their_kind(
    rnnt: Path, speech: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise CheckFailed("no")

    monkeypatch.setattr("onnx_intq.transducer_quantize.quantize", refuse)
    with pytest.raises(CheckFailed, match=r"^encoder.onnx: no$"):
        quantized(rnnt, speech)


@pytest.mark.slow
def test_on_the_command_line(rnnt: Path, speech: Path, command: Command) -> None:
    output = rnnt.with_name("q")
    options = ("--target", "integer", "--data", speech)
    code, out, err = command("quantize", rnnt, "-o", output, *options)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line for line in lines if line in PARTS] == list(PARTS)
    assert sum(line == "integers   proven" for line in lines) == 3
    code, out, err = command("check", output, "--integer-only")
    assert (code, err) == (0, "")
    assert out.count("overflow: none") == 3
    code, out, err = command("check", rnnt, "--integer-only", "--json")
    assert code == 1
    assert set(json.loads(out)["parts"]) == set(PARTS)
    assert err.startswith("error: encoder: ")
    code, out, _ = command("cost", output, "--json")
    assert set(json.loads(out)["parts"]) == set(PARTS)
    code, out, _ = command("cost", output, "--device", "t4", "--layers", 2)
    assert [line for line in out.splitlines() if line in PARTS] == list(PARTS)
    code, _, err = command("quantize", output, "-o", rnnt.with_name("again"), *options)
    assert (code, err.count("integer-only already")) == (2, 1)


@pytest.mark.slow
def test_tensorrt_stores_the_weights_of_its_layers(rnnt: Path, command: Command) -> None:
    output = rnnt.with_name("q")
    code, out, err = command("quantize", rnnt, "-o", output, "--target", "tensorrt", "--json")
    assert (code, err) == (0, "")
    parts = json.loads(out)["parts"]
    assert parts["predictor"]["quantized"] == {"LSTM": 2}
    assert parts["encoder"]["quantized"] == {"Conv": 1, "LSTM": 2}
    why = {reason for _, reason in parts["predictor"]["left"]}
    assert why == {"tensorrt has no integer LSTM"}
    code, out, _ = command("check", output, "--target", "tensorrt")
    assert (code, out.count("ready for tensorrt")) == (0, 3)


@pytest.mark.slow
def test_a_part_without_anything_to_quantize_is_copied(rnnt: Path, command: Command) -> None:
    output, recipe = rnnt.with_name("q"), "fold_bn, insert_qdq(target='tensorrt')"
    options = ("--recipe", recipe, "-o", output)
    code, out, err = command("quantize", rnnt, *options, "--json")
    assert (code, err) == (0, "")
    parts = json.loads(out)["parts"]
    assert parts["predictor"]["kept"].startswith("nothing was quantized")
    assert parts["encoder"]["quantized"] == {"Conv": 1}
    kept = (output / "predictor.onnx").read_bytes()
    assert kept == (rnnt / "predictor.onnx").read_bytes()
    code, out, err = command("quantize", rnnt, *options)
    assert "kept       as it is: nothing was quantized" in out


@pytest.mark.parametrize("options", [("--method", "random"), ("--device", "cpu")])
def test_options_of_synthesis(rnnt: Path, command: Command, options: tuple[str, str]) -> None:
    code, _, err = command("quantize", rnnt, "-o", rnnt.with_name("q"), *options)
    assert code == 2
    assert err.startswith(f"error: {options[0]} has no effect on an RNN-T")


@pytest.mark.slow
def test_overrides_name_nodes_of_one_part(rnnt: Path, speech: Path, command: Command) -> None:
    output = rnnt.with_name("q")
    chosen = ("--override", "*pre_encode*=float", "--override", "*joint_net*=5", "--boost", "none")
    code, out, err = command("quantize", rnnt, "-o", output, *chosen, "--data", speech, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["noise"] is False
    assert "Conv" not in found["parts"]["encoder"]["quantized"]
    bits = json.loads(load(output / "joint.onnx").intq_metadata["onnx_intq.bits"])
    assert 5 in bits.values()
    code, _, err = command("quantize", rnnt, "-o", output, "--override", "*gru*=5")
    assert (code, "no node matches '*gru*'" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("-a", "mixed"),
        ("--boost", "choose_grids"),
        pytest.param(("--target", "integer", "--cpu", "vnni"), marks=VNNI),
    ],
)
def test_grids_are_chosen_and_int8_is_multiplied(
    rnnt: Path, command: Command, options: tuple[str, ...]
) -> None:
    code, out, err = command("quantize", rnnt, "-o", rnnt.with_name("q"), *options)
    assert (code, err) == (0, "")
    assert out.startswith("data       noise; with --data, ranges are those of speech\n")


def test_feeds_are_no_speech(rnnt: Path, command: Command) -> None:
    code, _, err = command("quantize", rnnt, "-o", rnnt.with_name("q"), "--data", "f.npz")
    assert (code, "f.npz: feeds for an RNN-T, whose graphs" in err) == (2, True)


def test_exchanged_parts_are_refused(rnnt: Path, command: Command) -> None:
    shutil.copy(rnnt / "joint.onnx", rnnt / "encoder.onnx")
    for arguments in (("quantize", rnnt, "-o", rnnt.with_name("q")), ("cost", rnnt)):
        code, _, err = command(*arguments)
        assert (code, "encoder.onnx: takes encoded, predicted; exp" in err) == (2, True)
