"""The command `compare`: what it prints, draws and refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from onnx_intq.compare_console import verdict
from onnx_intq.comparison import Comparison, Errors, Row
from onnx_intq.feeds import write
from onnx_intq.graph import load, save

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def there(tiny: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `m.onnx`, made the current one, with feeds `f.npz` and quantized `q.onnx`."""
    monkeypatch.chdir(tiny.parent)
    rng = np.random.default_rng(0)
    write(Path("f.npz"), [{"audio_signal": rng.standard_normal((3, 4, 60)).astype(np.float32)}])
    assert command("quantize", "m.onnx", "-o", "q.onnx", "--data", "f.npz")[0] == 0
    return tiny.parent


def spoil(source: str, target: str, node: str) -> None:
    """Turn the signs of a quantized node's weights."""
    net = load(source)
    (found,) = (n for n in net.nodes if n.name == node)
    stored = found.inputs[1].inputs[0].inputs[0]
    stored.values = -stored.values
    save(net, target)


def test_the_table_names_the_worst_and_the_verdict_where_the_error_enters(
    there: Path, command: Command
) -> None:
    spoil("q.onnx", "bad.onnx", "Conv_3")
    code, out, err = command("compare", "m.onnx", "bad.onnx", "--data", "f.npz", "--worst", "2")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line.strip()]
    title, header, _, worst, second, *rest = lines
    assert " ".join(title).endswith("(float): worst 2 of 5")
    assert " ".join(header) == (
        "tensor layer free dB fall dB forced dB free max forced max forced steps"
    )
    assert worst[:2] == ["l", "Conv"]
    assert float(worst[4]) < 0 < 20 < float(second[4])
    assert rest[0] == ["data", "1", "batch", "of", "f.npz"]
    assert rest[1][:2] == ["output", "log_probs:"]
    assert " ".join(rest[2]).startswith("verdict the error enters at l (Conv): alone on A's values")
    assert "free-running, SQNR falls most at l (Conv)" in out
    assert len(lines) == 8


def test_all_tensors_come_in_order_and_integers_are_counted(there: Path, command: Command) -> None:
    spoil("q.onnx", "bad.onnx", "Conv_3")
    code, out, _ = command("compare", "q.onnx", "bad.onnx", "--all")
    assert code == 0
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert " ".join(lines[0]).endswith("all 5 tensors")
    assert [line[0] for line in lines[3:8]] == ["audio_signal", "r", "l", "t", "log_probs"]
    assert lines[1][-2:] == ["differ", "ppm"]
    assert (lines[3][-1], lines[7][-1]) == ("0", "-")
    assert "data       random numbers" in out
    assert "integers   differ teacher-forced " in out
    assert "free-running, SQNR falls most at l (Conv), exact -> " in out


def test_equal_models_are_said_to_be_equal(there: Path, command: Command) -> None:
    code, out, _ = command("compare", "q.onnx", "q.onnx")
    assert code == 0
    assert "verdict    no difference: all 5 tensors are equal" in out
    assert "output     log_probs: exact, largest error 0" in out
    assert "differ teacher-forced 0 per million, by 0 at most; free-running 0 per million" in out


def test_json_has_all_tensors_and_the_files(there: Path, command: Command) -> None:
    code, out, err = command("compare", "m.onnx", "q.onnx", "--data", "f.npz", "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    assert (found["a"], found["b"], found["data"]) == ("m.onnx", "q.onnx", "f.npz")
    assert found["kinds"] == ["float", "QDQ"]
    names = [entry["name"] for entry in found["tensors"]]
    assert names == ["audio_signal", "r", "l", "t", "log_probs"]
    assert sorted(found["worst"]) == sorted(names)
    assert found["outputs"] == ["log_probs"]
    assert found["enters"]["teacher_forced"] in names
    assert found["first_difference"] == "audio_signal"
    assert found["tensors"][1]["operators"] == ["Conv", "BatchNormalization", "Relu"]
    assert {"Conv_0", "Relu_2"} < set(found["tensors"][1]["nodes"])
    assert found["tensors"][0]["forced"]["largest_in_steps"] <= 0.5001


def test_what_could_not_be_compared_is_said(there: Path, command: Command) -> None:
    header = '<ir_version: 8, opset_import: ["" : 17]> n (float[2,3] x) => (float[2,3] y) '
    for name, body in {
        "a": "{ t = Transpose(x) u = Transpose(t) y = Neg(u) }",
        "b": "{ t = Abs(x) u = Neg(t) y = Neg(u) }",
    }.items():
        onnx.save(onnx.parser.parse_model(header + body), f"{name}.onnx")
    code, out, _ = command("compare", "a.onnx", "b.onnx")
    assert code == 0
    assert "left out   t: has shape [3, 2] in A, [2, 3] in B" in out


def test_speech_is_compared_by_the_recorded_front_end(
    there: Path, speech: Path, command: Command
) -> None:
    code, out, _ = command("compare", "m.onnx", "q.onnx", "--data", speech, "--batches", "1")
    assert code == 0
    assert f"data       1 batch of {speech}" in out
    code, out, _ = command("compare", "m.onnx", "q.onnx", "--data", speech)
    assert f"data       2 batches of {speech}" in out


@pytest.mark.parametrize("b", ["q.onnx", "m.onnx"])
def test_the_picture_is_drawn_the_same_each_time(there: Path, command: Command, b: str) -> None:
    for name in ("1.png", "2.png"):
        code, out, err = command("compare", "m.onnx", b, "--plot", name)
        assert (code, err) == (0, "")
        assert out.endswith(f"wrote      {name}\n")
    assert Path("1.png").read_bytes() == Path("2.png").read_bytes()
    with Image.open("1.png") as image:
        assert image.width > 1000
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # both lines


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("m.onnx", "none.onnx"), "none.onnx: no such file"),
        (("none.onnx", "m.onnx"), "none.onnx: no such file"),
        (("m.onnx", "q.onnx", "--data", "none.npz"), "none.npz: no such file"),
        (("m.onnx", "q.onnx", "--frontend", "f.json"), "without --data"),
        (("m.onnx", "q.onnx", "--all", "--worst", 3), "--worst has no effect"),
        (("m.onnx", "q.onnx", "--plot", "m.onnx"), "output is the input file"),
        (("m.onnx", "q.onnx", "--plot", "no/p.png"), "its folder does not exist"),
        (("m.onnx", "other.onnx"), "expected the same inputs"),
        (("m.onnx", "nan.onnx"), "model B gives NaN in tensor 'c'"),
        (("m.onnx",), "Missing argument 'B'"),
    ],
)
def test_wrong_use_is_one_line(
    there: Path, command: Command, arguments: tuple[object, ...], what: str
) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> n (float[2] z) => (float[2] y) { y = Neg(z) }'
    onnx.save(onnx.parser.parse_model(text), "other.onnx")
    broken = load("m.onnx")
    broken.nodes[0].inputs[1].values = np.full((8, 4, 3), np.nan, np.float32)
    save(broken, "nan.onnx")
    code, out, err = command("compare", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert what in err


def test_a_missing_matplotlib_is_said_before_the_work(
    there: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = command("compare", "m.onnx", "q.onnx", "--plot", "p.png")
    assert code == 2
    assert "pip install 'onnx_intq[report]'" in err


def test_an_error_that_no_layer_adds_is_said_to_come_from_outside() -> None:
    row = Row(
        name="t",
        tensor="t",
        operators=("Conv",),
        nodes=("n",),
        inputs=(),
        scale=None,
        zero_point=0,
        same_grid=False,
        output=True,
        free=Errors(elements=1, signal=1.0, noise=0.01),
    )
    found = Comparison(kinds=("integer", "float"), batches=1, rows=(row,))
    assert verdict(found) == (
        "on A's values all layers are exact; "
        "free-running, SQNR falls most at t (Conv), exact -> 20.0 dB"
    )
