"""The integer target on the command line: what is printed, written, proven and refused."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_intq.feeds import read, write
from onnx_intq.graph import load, metadata, save
from onnx_intq.lowering import GRIDS_KEY
from onnx_intq.registry import parse, render
from onnx_intq.samples import specs
from onnx_intq.source import recorded_frontend
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY

Command = Callable[..., tuple[int, str, str]]
DIGITS = Path(__file__).parent.parent / "models" / "pretrained" / "digits" / "manifest.json"
INTEGER = ("--target", "integer")


@pytest.fixture
def there(tiny: Path, speech: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> Path:
    """A folder, made the current one, with `m.onnx`, feeds `f.npz` and `q.onnx` for onnxruntime."""
    monkeypatch.chdir(tiny.parent)
    random = np.random.default_rng(0)
    batches = [
        {"audio_signal": random.standard_normal((2, 4, 30)).astype(np.float32)} for _ in range(3)
    ]
    write(Path("f.npz"), batches)
    assert command("quantize", "m.onnx", "-o", "q.onnx", "--data", "f.npz")[0] == 0
    return tiny.parent


def printed(outcome: tuple[int, str, str]) -> dict[str, Any]:
    """The one JSON object on stdout."""
    code, out, err = outcome
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_quantize_says_that_all_is_integer(there: Path, command: Command) -> None:
    options = (*INTEGER, "--data", "f.npz")
    code, out, err = command("quantize", "m.onnx", "-o", "i.onnx", *options)
    assert (code, err) == (0, "")
    lines = [line.split(maxsplit=1)[0] for line in out.splitlines()]
    assert lines == ["quantized", "size", "integers", "drift", "seconds", "recipe", "wrote"]
    assert "quantized  2 nodes: 2 ConvInteger\n" in out
    assert "integers   proven\n" in out
    found = printed(command("quantize", "m.onnx", "-o", "j.onnx", *options, "--json"))
    assert (found["integer_only"], found["float"]) == (True, [])
    assert Path("i.onnx").read_bytes() == Path("j.onnx").read_bytes()
    code, out, _ = command("check", "i.onnx", "--integer-only")
    assert code == 0
    assert "all integer but the boundary (1 QuantizeLinear, 1 DequantizeLinear)" in out


@pytest.mark.slow
def test_quantize_needs_nothing_but_the_model(there: Path, command: Command) -> None:
    found = printed(command("quantize", "m.onnx", "-o", "i.onnx", *INTEGER, "--json"))
    assert found["integer_only"] is True
    assert "synthesize" in found["seconds"]


def test_a_quantized_model_needs_no_data(there: Path, command: Command) -> None:
    options = (*INTEGER, "--verify", "--json")
    found = printed(command("quantize", "q.onnx", "-o", "i.onnx", *options))
    assert found["integer_only"] is True
    assert found["seconds"].keys() == {"load", "prepare", "passes", "save"}
    again = printed(command("quantize", "q.onnx", "-o", "j.onnx", *INTEGER, "--json"))
    assert Path("i.onnx").read_bytes() == Path("j.onnx").read_bytes()
    assert render(parse(again["recipe"])) == again["recipe"]
    code, _, err = command("quantize", "i.onnx", "-o", "k.onnx", *INTEGER)
    assert (code, "is integer-only already" in err) == (2, True)
    recorded = metadata(load("i.onnx"))
    assert {FRONTEND_KEY, LABELS_KEY, GRIDS_KEY, "onnx_intq.source_sha256"} <= recorded.keys()


def test_the_recipe_recorded_makes_the_same_model_again(there: Path, command: Command) -> None:
    command("quantize", "m.onnx", "-o", "1.onnx", *INTEGER, "--data", "f.npz")
    recipe = metadata(load("1.onnx"))["onnx_intq.recipe"]
    options = ("--recipe", recipe, "--data", "f.npz")
    assert command("quantize", "m.onnx", "-o", "2.onnx", *options)[0] == 0
    assert Path("1.onnx").read_bytes() == Path("2.onnx").read_bytes()
    command("quantize", "q.onnx", "-o", "3.onnx", *INTEGER)
    recipe = metadata(load("3.onnx"))["onnx_intq.recipe"]
    assert command("run", recipe, "q.onnx", "-o", "4.onnx", "--verify")[0] == 0
    tensors = [onnx.load(name).graph.initializer for name in ("3.onnx", "4.onnx")]
    assert list(tensors[0]) == list(tensors[1])


def test_integers_at_the_boundary_are_heard_the_same(
    there: Path, speech: Path, command: Command
) -> None:
    options = (*INTEGER, "--data", speech)
    assert command("quantize", "m.onnx", "-o", "f.onnx", *options)[0] == 0
    assert command("quantize", "m.onnx", "-o", "i.onnx", *options, "--io", "int8")[0] == 0
    graph = load("i.onnx")
    assert [t.dtype.name for t in (*graph.inputs, *graph.outputs)] == ["uint8", "int16"]
    grids = json.loads(metadata(graph)[GRIDS_KEY])
    assert [grids[name][0] for name in ("audio_signal", "log_probs")] == [
        "audio_signal",
        "log_probs",
    ]
    code, out, _ = command("check", "i.onnx", "--integer-only")
    assert code == 0
    assert "(0 QuantizeLinear, 0 DequantizeLinear)" in out
    manifest = ("--manifest", speech, "--against", "f.onnx", "--json")
    found = printed(command("evaluate", "i.onnx", *manifest))
    assert found["differs"] == 0
    assert found["errors"] == printed(command("evaluate", "f.onnx", *manifest))["errors"]


def test_what_stays_float_fails_the_check_unless_allowed(there: Path, command: Command) -> None:
    graph = load("q.onnx")
    (log_softmax,) = (node for node in graph.nodes if node.op == "LogSoftmax")
    log_softmax.op, log_softmax.name, log_softmax.attrs = "Hardmax", "hard", {}
    save(graph, "h.onnx")
    with unchanged(there):
        code, out, err = command("quantize", "h.onnx", "-o", "i.onnx", *INTEGER)
        assert (code, out) == (1, "")
        assert re.fullmatch(r"error: 'hard' has no integer form: [^\n]*--allow-float\n", err)
        recipe = "complete_qdq, integerize_conv, integerize_boundary"
        code, out, err = command("run", recipe, "h.onnx", "-o", "i.onnx")
        assert (code, out) == (1, "")
        assert re.fullmatch(r"error: 'hard' has no integer form[^\n]*--allow-float\n", err)
    options = (*INTEGER, "--allow-float")
    code, out, err = command("quantize", "h.onnx", "-o", "i.onnx", *options)
    assert (code, err) == (0, "")
    assert re.search(r"^integers   not integer-only, \d+ findings: ", out, re.MULTILINE)
    found = printed(command("quantize", "h.onnx", "-o", "i.onnx", *options, "--json"))
    assert found["integer_only"] is False
    assert found["float"]
    assert command("check", "i.onnx", "--integer-only")[0] == 1
    assert command("run", recipe, "h.onnx", "-o", "j.onnx", "--allow-float")[0] == 0


ALREADY = "has no effect on a model that is quantized already"
WRONG = [
    ("quantize m.onnx -o o.onnx --nonlinear lut", "--nonlinear has no effect without --target int"),
    ("quantize m.onnx -o o.onnx --io int8", "--io has no effect without --target integer"),
    ("quantize m.onnx -o o.onnx --cpu any", "--cpu has no effect without --target integer"),
    ("quantize m.onnx -o o.onnx --allow-float", "--allow-float has no effect without --target int"),
    (
        "quantize m.onnx -o o.onnx --target tensorrt --io int8",
        "--io has no effect without --target",
    ),
    ("quantize m.onnx -o o.onnx --recipe fold_bn --io int8", "--io has no effect beside --recipe"),
    ("quantize m.onnx -o o.onnx --recipe fold_bn --nonlinear lut", "--nonlinear has no effect bes"),
    (
        "quantize m.onnx -o o.onnx --target integer --override *=float",
        "kept float for target integ",
    ),
    (
        "quantize m.onnx -o o.onnx --target integer --nonlinear float",
        "left in float for target int",
    ),
    ("quantize m.onnx -o o.onnx --target integer --nonlinear nonsense", "'nonsense' is not one of"),
    (
        "quantize m.onnx -o o.onnx --target integer --io int4",
        "'int4' is not one of 'float', 'int8'",
    ),
    ("quantize m.onnx -o m.onnx --target integer --data f.npz", "output is the input file"),
    ("quantize q.onnx -o q.onnx --target integer", "output is the input file"),
    ("quantize q.onnx -o nowhere/o.onnx --target integer", "its folder does not exist"),
    ("quantize q.onnx -o o.onnx --target integer --method random", f"--method {ALREADY}"),
    ("quantize q.onnx -o o.onnx --target integer --observer mse", f"--observer {ALREADY}"),
    ("quantize q.onnx -o o.onnx --target integer --seed 1", f"--seed {ALREADY}"),
    ("quantize q.onnx -o o.onnx --target integer -w 4", f"--weights {ALREADY}"),
    ("quantize q.onnx -o o.onnx --target integer -a 16", f"--activations {ALREADY}"),
    ("quantize q.onnx -o o.onnx --target integer --override *=4", f"--override {ALREADY}"),
    ("quantize q.onnx -o o.onnx --target ort", "the model is quantized already; expected a float"),
    ("quantize q.onnx -o o.onnx --recipe integerize_conv", "the model is quantized already"),
    (
        "quantize q.onnx -o o.onnx --recipe integerize_boundary",
        "integerize_boundary needs complete",
    ),
    ("quantize nowhere.onnx -o o.onnx --target integer", "nowhere.onnx: no such file"),
    ("quantize junk.onnx -o o.onnx --target integer", "junk.onnx: not an ONNX model"),
    ("quantize half.onnx -o o.onnx --target integer", "is float16; expected a float32 model"),
    (
        "quantize qop.onnx -o o.onnx --target integer",
        "QLinearMatMul .*QOperator format; expected Q",
    ),
    (
        "quantize ints.onnx -o o.onnx --target integer",
        "MatMulInteger .*: the model is quantized already",
    ),
    ("run integerize_conv m.onnx -o o.onnx", "integerize_conv needs complete, which no"),
    ("run complete_qdq m.onnx -o o.onnx", "complete_qdq needs quantized, which no earlier pass"),
    ("run complete_qdq(cpu='x86') q.onnx -o o.onnx", "expected .*any"),
    (
        "run complete_qdq,integerize_boundary(io='x') q.onnx -o o.onnx",
        "io 'x'; expected 'float' or",
    ),
    ("evaluate broken.onnx --manifest speech/manifest.json", "onnx_intq.grids cannot be read"),
]
MODELS = {
    "half": """(float16[2] x) => (float16[2] y) <float16 s = {1}>
        { q = QuantizeLinear(x, s) y = DequantizeLinear(q, s) }""",
    "qop": """(float[2, 2] x) => (float[2, 2] y)
        <float s = {1}, uint8 z = {0}, uint8[2, 2] w = {1, 2, 3, 4}> {
            q = QuantizeLinear(x, s, z) r = QLinearMatMul(q, s, z, w, s, z, s, z)
            y = DequantizeLinear(r, s, z) }""",
    "ints": "(int8[n, 2] x) => (int32[n, 2] y) { y = MatMulInteger(x, w) }",
}


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_wrong_use_gives_one_line(there: Path, command: Command, line: str, message: str) -> None:
    Path("junk.onnx").write_text("this is no model")
    for name, text in MODELS.items():
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
        if name == "ints":
            weight = onnx.numpy_helper.from_array(np.ones((2, 2), np.int8), "w")
            proto.graph.initializer.append(weight)
        onnx.save(proto, f"{name}.onnx")
    broken = load("m.onnx")
    metadata(broken)[GRIDS_KEY] = "?"
    save(broken, "broken.onnx")
    with unchanged(there):
        code, out, err = command(*line.split())
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert re.search(message, err)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [False, True])
def test_the_embedded_model_is_heard_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, lengths: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    command("export", "digits", "-o", "m.onnx", *(["--lengths"] if lengths else []))
    assert command("quantize", "m.onnx", "-o", "q.onnx", "--data", DIGITS)[0] == 0
    for name, source, options in (
        ("i", "m", ("--data", DIGITS)),
        ("v", "m", ("--data", DIGITS, "--cpu", "vnni")),
        ("l", "q", ("--nonlinear", "lut")),
        ("j", "q", ()),
        ("k", "q", ("--io", "int8")),
    ):
        found = printed(
            command(
                "quantize", f"{source}.onnx", "-o", f"{name}.onnx", *INTEGER, *options, "--json"
            )
        )
        assert found["integer_only"] is True
        assert command("check", f"{name}.onnx", "--integer-only")[0] == 0
        against = ("--manifest", DIGITS, "--against", "q.onnx", "--batch-size", 3, "--json")
        heard = printed(command("evaluate", f"{name}.onnx", *against))
        assert (heard["differs"], heard["words"]) == (0, 79)
    assert Path("i.onnx").stat().st_size < 1.05 * Path("q.onnx").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("choice", [{}, {"per_channel": True}])
def test_another_tools_model_of_speech_is_heard_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, foreign: Any, choice: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    command("export", "digits", "-o", "d.onnx")
    command("run", "fold_constants, drop_identity, fold_bn", "d.onnx", "-o", "m.onnx")
    graph = load("m.onnx")
    batches = list(read(str(DIGITS), frontend=recorded_frontend(graph), inputs=specs(graph)))
    save(foreign(onnx.load("m.onnx"), batches, **choice), "q.onnx")
    found = printed(command("quantize", "q.onnx", "-o", "i.onnx", *INTEGER, "--json"))
    assert found["integer_only"] is True
    assert command("check", "i.onnx", "--integer-only")[0] == 0
    recorded = metadata(graph)
    Path("frontend.json").write_text(recorded[FRONTEND_KEY])
    Path("labels.json").write_text(recorded[LABELS_KEY])
    given = ("--frontend", "frontend.json", "--labels", "labels.json")
    options = ("--manifest", DIGITS, "--against", "q.onnx", *given, "--json")
    assert printed(command("evaluate", "i.onnx", *options))["differs"] == 0
