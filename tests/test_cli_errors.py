"""What users get wrong: one line on stderr, an exit code, and every file as it was before."""

import errno
import hashlib
import json
import os
import re
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from onnx_intq.cli import cli
from onnx_intq.hollow import Hollow

Command = Callable[..., tuple[int, str, str]]
OPSET = 17
HEADER = '<ir_version: 8, opset_import: ["" : {opset}]>'
SIGNATURE = "g (float[batch, 4, time] x) => (float[batch, 4, time] y)"
BODIES = {
    "no_bn": "{ h = Conv(x, w) y = Relu(h) }",
    "stays": "{ h = Conv(x, w) s = Relu(h) y = BatchNormalization(s, v, v, v, v) }",
    "relu": "{ y = Relu(x) }",
}
SCAN = """<int64[1] lengths = {4}> {
        h = Conv(x, w)
        y = Scan<num_scan_inputs = 1, body = b (float[t] i) => (float[t] o) { o = Relu(i) }>
            (lengths, h)
    }"""
FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
    g (float[4] x) => (float[4] y) { y = f.twice(x) }
    <domain: "f", opset_import: ["" : 17, "own" : 1]> twice (a) => (b) { b = own.Double(a) }"""
CONDITIONAL = """g (float[batch, 4, time] x) => (float[batch, 4, time] y)
    <bool yes = {1}> {
        y = If(yes) <
            then_branch = a () => (float[batch, 4, time] p) { p = Conv(x, w) },
            else_branch = b () => (float[batch, 4, time] q) { q = Identity(x) }>
    }"""


def model(text: str, opset: int = OPSET) -> onnx.ModelProto:
    """The graph of the text, with weights `w` [4, 4, 1] and `v` [4]."""
    proto = onnx.parser.parse_model(HEADER.format(opset=opset) + text)
    used = {name for node in proto.graph.node for name in node.input}
    w = np.random.default_rng(0).standard_normal((4, 4, 1)).astype(np.float32)
    for name, values in (("w", w), ("v", np.ones(4, np.float32))):
        if name in used or "If" in text:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


@pytest.fixture
def there(tiny: Path, speech: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, made the current one, with the good `m.onnx` and `speech/` and much that is bad."""
    folder = tiny.parent
    monkeypatch.chdir(folder)
    content = tiny.read_bytes()
    Path("junk.onnx").write_text("this is no model")
    Path("empty.onnx").write_bytes(b"")
    Path("cut.onnx").write_bytes(content[: len(content) // 2])
    for name, body in BODIES.items():
        onnx.save(model(SIGNATURE + body), f"{name}.onnx")
    onnx.save(model(CONDITIONAL), "if.onnx")
    half = model(SIGNATURE.replace("float", "float16") + BODIES["relu"])
    onnx.save(half, "half.onnx")
    onnx.save(model(SIGNATURE + "{ h = Conv(x, w) y = ATen(h) }", opset=17), "operator.onnx")
    onnx.save(model(SIGNATURE + SCAN, opset=8), "old.onnx")
    onnx.save(onnx.parser.parse_model(FUNCTION), "function.onnx")
    rankless = model(SIGNATURE + BODIES["no_bn"])
    rankless.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(rankless, "rankless.onnx")
    onnx.save(
        model("g (float[a, b, c, 4] x) => (float[a, b, c, 4] y)" + BODIES["relu"]), "free.onnx"
    )
    good = np.ones((1, 4, 30), np.float32)
    batches: dict[str, dict[str, npt.NDArray[Any]]] = {
        "good": {"audio_signal": good},
        "nan": {"audio_signal": good * np.float32("nan")},
        "other": {"x": good},
        "wide": {"audio_signal": np.ones((1, 5, 30), np.float32)},
        "double": {"audio_signal": good.astype(np.float64)},
    }
    for name, batch in batches.items():
        with zipfile.ZipFile(f"{name}.npz", "w") as archive:
            for key, values in batch.items():
                with archive.open(f"0000/{key}.npy", "w") as file:
                    np.save(file, values)
    Path("none").mkdir()
    Path("empty.json").write_text("")
    Path("broken.json").write_text('{"audio_filepath": ')
    Path("lost.json").write_text('{"audio_filepath": "lost.wav"}')
    Path("recipe.txt").write_text("fold_bn, nonsense")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` and its digest."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    assert contents(folder) == before


def complaint(outcome: tuple[int, str, str], code: int = 2) -> str:
    """The one line on stderr, checked for its form."""
    assert outcome[:2] == (code, "")
    assert re.fullmatch(r"error: [^\n]+\n", outcome[2])
    return outcome[2]


FILES = [
    ("quantize nowhere.onnx -o o.onnx", "nowhere.onnx: no such file; expected an ONNX model"),
    ("quantize . -o o.onnx", "holds no encoder.onnx"),
    ("quantize junk.onnx -o o.onnx", "junk.onnx: not an ONNX model"),
    ("quantize empty.onnx -o o.onnx", "empty.onnx: not an ONNX model"),
    ("quantize cut.onnx -o o.onnx", "cut.onnx: not an ONNX model"),
    ("synthesize junk.onnx -o o.npz", "junk.onnx: not an ONNX model"),
    ("calibrate junk.onnx -o o.json --data good.npz", "junk.onnx: not an ONNX model"),
    ("run fold_bn junk.onnx -o o.onnx", "junk.onnx: not an ONNX model"),
    ("check junk.onnx --target ort", "junk.onnx: not an ONNX model"),
    ("check junk.onnx --integer-only", "junk.onnx: not an ONNX model"),
    ("compare m.onnx junk.onnx", "junk.onnx: not an ONNX model"),
    ("cost junk.onnx", "junk.onnx: not an ONNX model"),
    ("compress junk.onnx -o o.onnx --bits 5", "junk.onnx: not an ONNX model"),
    ("train junk.onnx -o o.onnx --data good.npz", "junk.onnx: not an ONNX model"),
    ("bench m.onnx junk.onnx", "junk.onnx: not an ONNX model"),
    ("bench none", "none: is a folder; expected an ONNX model; name a file in it, .*encoder.onnx"),
    ("cost none", "none: holds no encoder.onnx; expected an RNN-T's"),
    ("evaluate junk.onnx --manifest speech/manifest.json", "junk.onnx: onnxruntime cannot load it"),
    ("evaluate nowhere.onnx --manifest speech/manifest.json", "nowhere.onnx: no such file"),
    ("build nowhere.onnx -o o.engine --backend tensorrt-rtx", "nowhere.onnx: no such file; exp"),
    ("build junk.onnx -o o.engine --backend tensorrt-rtx", "junk.onnx: not an ONNX model"),
    ("export nonsense -o o.onnx", "unknown model 'nonsense'; expected FILE.nemo or one of"),
    ("export nowhere.nemo -o o.onnx", "nowhere.nemo: no such file"),
    ("export quartznet5x5 -o o.onnx --opset 9", "opset is 9; expected 17 to 23"),
]
MODELS = [
    ("quantize old.onnx -o o.onnx --method random", "opset 8 cannot be raised to 13 .*; export"),
    ("quantize operator.onnx -o o.onnx", "onnxruntime cannot load it: .*ATen"),
    ("quantize half.onnx -o o.onnx", "tensor 'x' is float16; expected a float32 model; export"),
    ("quantize if.onnx -o o.onnx --method random", "stands in the body of an If, .*; export"),
    ("quantize no_bn.onnx -o o.onnx", "no BatchNormalization .*; export it with .*or .* --data"),
    ("synthesize no_bn.onnx -o o.npz", "no BatchNormalization .*; export it with"),
    ("synthesize free.onnx -o o.npz --method random", "dynamic axes other than batch and time"),
    ("quantize rankless.onnx -o o.onnx --data good.npz", "'shape' .* missing"),
    ("compress half.onnx -o o.onnx --bits 5", "tensor 'x' is float16; expected a float32 model"),
    ("train half.onnx -o o.onnx --data good.npz", "tensor 'x' is float16; expected a float32"),
    ("train relu.onnx -o o.onnx --data good.npz", "holds no weights to quantize; expected Conv"),
    ("synthesize rankless.onnx -o o.npz", "'shape' .* missing"),
    ("check function.onnx --target ort", "shapes cannot .* import for domain own .*; exp"),
    ("build function.onnx -o o.engine --backend tensorrt-rtx", "function.onnx: shapes cannot"),
    ("quantize relu.onnx -o o.onnx --method random", "nothing was quantized .*; expected at least"),
    ("quantize m.onnx -o o.onnx --data good.npz --override *=float", "kept float by request"),
]
DATA = [
    ("quantize m.onnx -o o.onnx --data nowhere.npz", "nowhere.npz: no such file or folder"),
    ("quantize m.onnx -o o.onnx --data none", "none: holds no utterances"),
    ("quantize m.onnx -o o.onnx --data empty.json", "empty.json: holds no utterances"),
    ("quantize m.onnx -o o.onnx --data broken.json", "broken.json, line 1: invalid JSON"),
    ("quantize m.onnx -o o.onnx --data lost.json", "no file lost.wav"),
    ("quantize m.onnx -o o.onnx --data nan.npz", "'audio_signal' holds NaN or infinity"),
    ("quantize m.onnx -o o.onnx --data other.npz", "feeds hold 'x', which .* not take; expected"),
    ("quantize m.onnx -o o.onnx --data wide.npz", r"has shape \[1, 5, 30\]; expected"),
    ("quantize m.onnx -o o.onnx --data double.npz", "is float64; expected"),
    ("quantize m.onnx -o o.onnx --data good.npz --ranges r.json", "both --ranges .* and --data"),
    ("quantize m.onnx -o o.onnx --ranges nowhere.json", "nowhere.json: cannot be read"),
    ("quantize m.onnx -o o.onnx --ranges empty.json", "empty.json: not JSON"),
    ("compress m.onnx -o o.onnx --bits 5 --data nan.npz", "'audio_signal' holds NaN or infinity"),
    ("train m.onnx -o o.onnx --data nan.npz", "'audio_signal' holds NaN or infinity"),
    ("train m.onnx -o o.onnx --data wide.npz", r"has shape \[1, 5, 30\]; expected"),
    ("train m.onnx -o o.onnx --manifest lost.json", "no file lost.wav"),
    ("calibrate m.onnx -o o.json --data nan.npz", "'audio_signal' holds NaN or infinity"),
    ("calibrate m.onnx -o o.json --data empty.json", "empty.json: holds no utterances"),
    ("evaluate m.onnx --manifest empty.json", "empty.json: holds no utterances"),
    ("evaluate relu.onnx --manifest speech/manifest.json", "does not record .*; give --frontend"),
    ("evaluate m.onnx --manifest speech/manifest.json --labels empty.json", "empty.json: is empty"),
    ("synthesize m.onnx -o o.npz --plot p.png --real empty.json", "empty.json: holds no utterance"),
]
OPTIONS = [
    ("", "Missing command"),
    ("nonsense", "No such command 'nonsense'"),
    ("quantize m.onnx", "Missing option '-o'"),
    ("quantize -o o.onnx", "Missing argument 'MODEL'"),
    ("quantize m.onnx -o o.onnx --nonsense", "No such option '?--nonsense"),
    ("quantize m.onnx -o o.onnx --target nonsense", "'nonsense' is not one of 'ort', 'tensorrt'"),
    ("quantize m.onnx -o o.onnx -w 9", "9 is not in the range 2<=x<=8"),
    ("quantize m.onnx -o o.onnx -a 4", "'4' is not one of '8', '16'"),
    ("quantize m.onnx -o o.onnx --seed -1", "-1 is not in the range 0<=x"),
    (
        "quantize m.onnx -o o.onnx --override Conv_0",
        "expected NODES=BITS, 2..8, NODES=a16 or NODES=float",
    ),
    (
        "quantize m.onnx -o o.onnx --override Conv_0=9",
        "expected NODES=BITS, 2..8, NODES=a16 or NODES=float",
    ),
    ("quantize m.onnx -o o.onnx --override =4", "expected NODES=BITS, 2..8, NODES=a16 or NODES"),
    (
        "quantize m.onnx -o o.onnx --override nonsense*=4",
        r"no node matches 'nonsense\*'; .*'Conv_0'",
    ),
    ("quantize m.onnx -o o.onnx --override x=float", "no node matches 'x'; .*'Conv_0'"),
    ("quantize m.onnx -o o.onnx --recipe nonsense", "unknown pass 'nonsense'; expected one of"),
    ("quantize m.onnx -o o.onnx --recipe fold_bn(x=1)", "fold_bn has no option 'x'; it takes none"),
    (
        "quantize m.onnx -o o.onnx --recipe insert_qdq(x=1)",
        "insert_qdq has no option 'x'; expected",
    ),
    ("quantize m.onnx -o o.onnx --recipe insert_qdq(keep=1)", "option keep of insert_qdq: 1; exp"),
    ("quantize m.onnx -o o.onnx --recipe fold_bn(", "cannot read recipe 'fold_bn"),
    ("quantize m.onnx -o o.onnx --recipe insert_qdq", "insert_qdq needs bn-folded, which no"),
    ("quantize m.onnx -o o.onnx --recipe @nowhere", "nowhere: cannot be read"),
    ("quantize m.onnx -o o.onnx --recipe @recipe.txt", "unknown pass 'nonsense'"),
    ("quantize m.onnx -o o.onnx --recipe @empty.json", "recipe '@empty.json' is empty; expected"),
    ("quantize m.onnx -o o.onnx --device nonsense", "'nonsense' is not one of 'cpu', 'cuda'"),
    ("quantize m.onnx -o o.onnx --target tensorrt -a 16 --data good.npz", "16-bit activations"),
    ("run fold_bn m.onnx", "no output file; expected -o FILE; give one, or --dry-run"),
    ("run insert_qdq m.onnx -o o.onnx", "insert_qdq needs .*--data or --ranges"),
    ("passes nonsense", "unknown pass 'nonsense'"),
    ("check m.onnx", "nothing to check; expected --target, --integer-only or both"),
    ("synthesize m.onnx -o o.npz --lr nan", "nan is not finite"),
    ("synthesize m.onnx -o o.npz --steps -1", "-1 is not in the range x>=0"),
    ("synthesize m.onnx -o o.npz --frames 1000000000000", "out of memory; give fewer or shorter"),
    ("synthesize m.onnx -o o.npz --real speech/manifest.json", "without --plot; expected both"),
    ("cost m.onnx --seconds 0", "0.0 is not in the range"),
    ("compress m.onnx -o o.onnx --bits 0", "0 is not in the range 1<=x<=8"),
    ("compress m.onnx -o o.onnx", "its weights are float; .*; add --bits"),
    ("train m.onnx -o o.onnx", "neither --manifest nor --data given; expected"),
    ("train m.onnx -o o.onnx --data good.npz --bits 9", "9 is not in the range 1<=x<=8"),
    ("bench m.onnx --seconds inf", "inf is not in the range"),
    ("build m.onnx", "Missing option '-o'"),
    ("build m.onnx -o o.engine --backend nonsense", "'nonsense' is not one of 'tensorrt', "),
    ("build m.onnx -o o.engine --shapes audio_signal=1x5x9", "1x5x9 .*'audio_signal' do not fit"),
]
OUTPUTS = [
    ("quantize m.onnx -o m.onnx", "m.onnx: output is the input file; .*change -o"),
    ("quantize m.onnx -o ./none/../m.onnx", "output is the input file"),
    ("run fold_bn m.onnx -o m.onnx", "m.onnx: output is the input file"),
    ("synthesize m.onnx -o m.onnx", "m.onnx: output is the input file"),
    ("synthesize m.onnx -o o.npz --plot m.onnx", "m.onnx: output is the input file"),
    ("synthesize m.onnx -o o.npz --plot o.npz", "o.npz: is also the output; .*change --plot"),
    ("synthesize m.onnx -o o.npz --plot nowhere/p.png", "nowhere/p.png: its folder does not exist"),
    ("calibrate m.onnx -o good.npz --data good.npz", "good.npz: output is the input file"),
    ("quantize m.onnx -o nowhere/o.onnx", "nowhere/o.onnx: its folder does not exist; create it"),
    ("synthesize m.onnx -o nowhere/o.npz", "nowhere/o.npz: its folder does not exist"),
    ("calibrate m.onnx -o nowhere/o.json --data good.npz", "its folder does not exist"),
    ("run fold_bn m.onnx -o nowhere/o.onnx", "its folder does not exist"),
    ("compress m.onnx -o m.onnx --bits 5", "m.onnx: output is the input file; .*change -o"),
    ("train m.onnx -o m.onnx --data good.npz", "m.onnx: output is the input file; .*change -o"),
    ("export quartznet5x5 -o nowhere/o.onnx", "its folder does not exist"),
    ("build m.engine -o m.engine", "m.engine: output is the input file; .*change -o"),
    ("build o.engine.json -o o.engine", "o.engine.json: output is the input file; .*change -o"),
    ("run fold_bn m.onnx -o none", "none: .*folder|none: .*directory"),
]


@pytest.mark.parametrize(("line", "message"), [*FILES, *MODELS, *DATA, *OPTIONS, *OUTPUTS])
def test_bad_input_gives_one_line(there: Path, command: Command, line: str, message: str) -> None:
    with unchanged(there):
        assert re.search(message, complaint(command(*line.split())))


def test_every_command_is_covered() -> None:
    lines = [line for line, _ in (*FILES, *MODELS, *DATA, *OPTIONS, *OUTPUTS) if line]
    assert {line.split()[0] for line in lines} == {*cli.commands, "nonsense"}


@pytest.mark.slow
def test_bad_weights_give_one_line(there: Path, command: Command) -> None:
    with unchanged(there):
        outcome = command("export", "quartznet5x5", "-o", "o.onnx", "--weights", "broken.json")
        assert "broken.json: weights are not" in complaint(outcome)


def test_quantized_models_are_no_input(there: Path, command: Command) -> None:
    assert command("quantize", "m.onnx", "-o", "q.onnx", "--data", "good.npz")[0] == 0
    with unchanged(there):
        message = "the model is quantized already; .*start from the file it was made of"
        assert re.search(message, complaint(command("quantize", "q.onnx", "-o", "o.onnx")))
        options = ("--data", "good.npz", "-o", "o.json")
        assert re.search(message, complaint(command("calibrate", "q.onnx", *options)))


def test_ranges_of_another_model_are_refused(there: Path, command: Command) -> None:
    command("calibrate", "no_bn.onnx", "-o", "r.json", "--data", "other.npz")
    with unchanged(there):
        line = complaint(command("quantize", "m.onnx", "-o", "o.onnx", "--ranges", "r.json"))
    assert re.search(r"tensor '\w+' has no range; .*calibrate this very model", line)


@pytest.mark.parametrize(
    "line",
    [
        "quantize stays.onnx -o o.onnx --method random",
        "run fold_bn stays.onnx -o o.onnx",
        "run fold_bn stays.onnx --dry-run",
    ],
)
def test_batchnorms_that_stay_fail_the_check(there: Path, command: Command, line: str) -> None:
    with unchanged(there):
        found = complaint(command(*line.split()), code=1)
    assert re.search(r"BatchNormalization '\w+' cannot be folded: .*--allow-bn", found)
    code, _, err = command(*line.split(), "--allow-bn")
    assert (code, err) == (0, "")
    if "-o" in line:
        kept = {node.op_type for node in onnx.load("o.onnx").graph.node}
        assert "BatchNormalization" in kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("line", ["quantize m.onnx -o o.onnx", "synthesize m.onnx -o o.npz"])
def test_cuda_needs_a_device(there: Path, command: Command, line: str) -> None:
    with unchanged(there):
        found = complaint(command(*line.split(), "--device", "cuda"))
    assert "no CUDA device found; expected one; use --device cpu" in found


@pytest.mark.parametrize(
    ("package", "extra", "line"),
    [
        ("onnxruntime", "cpu", "quantize m.onnx -o o.onnx"),
        ("onnxruntime", "cpu", "calibrate m.onnx -o o.json --data good.npz"),
        ("onnxruntime", "cpu", "evaluate m.onnx --manifest speech/manifest.json"),
        ("onnxruntime", "cpu", "bench m.onnx"),
        ("librosa", "speech", "calibrate m.onnx -o o.json --data speech/manifest.json"),
        ("soundfile", "speech", "quantize m.onnx -o o.onnx --data speech/manifest.json"),
        ("jiwer", "speech", "evaluate m.onnx --manifest speech/manifest.json"),
        ("matplotlib", "report", "synthesize m.onnx -o o.npz --plot p.png"),
        ("tensorrt", "tensorrt", "build m.onnx -o o.engine --backend tensorrt"),
    ],
)
def test_missing_extras_are_named(
    there: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    extra: str,
    line: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with unchanged(there):
        found = complaint(command(*line.split()))
    assert f"cannot import {package} " in found
    assert f"run: pip install 'onnx_intq[{extra}]'" in found


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("o.onnx", "quantize m.onnx -o o.onnx --data good.npz"),
        ("o.onnx", "run fold_bn m.onnx -o o.onnx"),
        ("o.json", "calibrate m.onnx -o o.json --data good.npz"),
        ("o.npz", "synthesize m.onnx -o o.npz --method random"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_no_half_files(
    there: Path, command: Command, output: str, line: str, exists: bool
) -> None:
    if exists:
        Path(output).write_text("what was there before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with unchanged(there):
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))  # bytes a file may have
        try:
            outcome = command(*line.split())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert f"{output}: cannot be written: {os.strerror(errno.EFBIG)}" in complaint(outcome)


def test_a_disk_that_fills_up_is_named(
    there: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Hollow.write

    def full(model: Hollow, path: Path) -> None:
        write(model, path)
        os.truncate(path, path.stat().st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Hollow, "write", full)
    with unchanged(there):
        found = complaint(command("run", "fold_bn", "m.onnx", "-o", "o.onnx"))
    assert "o.onnx: cannot be written: No space left on device; nothing was left behind" in found


def test_a_bug_keeps_its_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(f"no pass {name}, for we have a bug")

    monkeypatch.setattr("onnx_intq.registry.load", fail)
    with pytest.raises(RuntimeError, match="we have a bug"):
        command("passes", "fold_bn")


def test_what_others_log_does_not_reach_stdout(there: Path, command: Command) -> None:
    proto = onnx.load("m.onnx")
    proto.opset_import.append(onnx.helper.make_opsetid("custom", 1))
    onnx.save(proto, "two.onnx")
    code, out, err = command("cost", "two.onnx", "--json")
    assert (code, err) == (0, "")
    json.loads(out)
