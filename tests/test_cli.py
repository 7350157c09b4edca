"""Every command's happy path: what it prints, what it writes, and that it does so again."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import onnx
import pytest

import onnx_intq
from onnx_intq import registry
from onnx_intq.cli import cli
from onnx_intq.feeds import fingerprint
from onnx_intq.graph import sha256
from onnx_intq.ranges import read
from onnx_intq.runtime import Session
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY

Command = Callable[..., tuple[int, str, str]]
QUICK = ("--batches", 1, "--batch-size", 2, "--frames", 50, "--steps", 5)
HEAVY = ("torch", "onnxruntime", "librosa", "matplotlib", "soundfile", "jiwer")


@pytest.fixture
def there(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `m.onnx`, made the current one."""
    monkeypatch.chdir(tiny.parent)
    return tiny.parent


@pytest.fixture
def quantized(there: Path, command: Command) -> Path:
    """The folder with `f.npz`, `r.json` and `q.onnx` made of `m.onnx`."""
    assert command("synthesize", "m.onnx", "-o", "f.npz", *QUICK)[0] == 0
    assert command("calibrate", "m.onnx", "--data", "f.npz", "-o", "r.json")[0] == 0
    assert command("quantize", "m.onnx", "-o", "q.onnx", "--ranges", "r.json")[0] == 0
    return there


def recorded(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def printed(outcome: tuple[int, str, str]) -> dict[str, Any]:
    """The one JSON object on stdout."""
    code, out, err = outcome
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def processor_seconds(*command: str) -> float:
    def used() -> float:
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    before = used()
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return used() - before


def test_help_answers_at_once() -> None:
    # 0.5 s is the promise; a busy or slow machine gets twice that, three times over.
    command = (sys.executable, "-m", "onnx_intq.cli", "--help")
    assert min(processor_seconds(*command) for _ in range(3)) < 1.0


def test_the_command_line_loads_no_heavy_library() -> None:
    text = f"import sys, onnx_intq.cli; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", text], check=True, capture_output=True, timeout=60, text=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_explains_itself(name: str, command: Command) -> None:
    for option in ("--help", "-h"):
        code, out, err = command(name, option)
        assert (code, err) == (0, "")
        assert out.startswith(f"Usage: onnx-intq {name} ")
    options = [each for each in cli.commands[name].params if isinstance(each, click.Option)]
    assert all(each.help for each in options)


def test_the_version_is_told(command: Command) -> None:
    assert command("--version") == (0, f"onnx-intq, version {onnx_intq.__version__}\n", "")
    code, out, _ = command("--help")
    assert code == 0
    assert all(f"  {name}" in out for name in cli.commands)


def test_synthesize_writes_feeds(there: Path, speech: Path, command: Command) -> None:
    plot = ("--plot", "p.png", "--real", speech)
    code, out, err = command("synthesize", "m.onnx", "-o", "f.npz", *QUICK, *plot)
    assert (code, err) == (0, "")
    assert "KL divergence per BatchNorm, first batch: the 1 largest of 1" in out
    assert out.endswith("wrote 1 batch to f.npz\nwrote the picture p.png\n")
    assert (there / "p.png").read_bytes().startswith(b"\x89PNG")
    found = printed(command("synthesize", "m.onnx", "-o", "g.npz", *QUICK, "--json"))
    assert (found["output"], found["batches"], len(found["loss"][0])) == ("g.npz", 1, 5)
    ((_, divergence),) = found["divergence"].items()
    assert divergence["after"] < divergence["before"]
    assert (there / "f.npz").read_bytes() == (there / "g.npz").read_bytes()


def test_the_control_has_nothing_to_minimise(there: Path, command: Command) -> None:
    options = (*QUICK[:-2], "--method", "random", "--json")
    found = printed(command("synthesize", "m.onnx", "-o", "f.npz", *options))
    assert found["loss"] == [[]]


def test_seeds_decide(there: Path, command: Command) -> None:
    digests = set()
    for seed in (0, 1):
        command("synthesize", "m.onnx", "-o", f"{seed}.npz", *QUICK, "--seed", seed)
        digests.add(sha256(there / f"{seed}.npz"))
    assert len(digests) == 2


def test_calibrate_records_ranges_of_feeds_and_of_speech(
    quantized: Path, speech: Path, command: Command
) -> None:
    options = ("--data", speech, "-o", "s.json", "--observer", "entropy")
    code, out, err = command("calibrate", "m.onnx", *options)
    assert (code, out) == (0, "")
    assert re.fullmatch(r"wrote ranges of \d tensors to s\.json\n", err)
    assert (read("r.json").observer, read("s.json").observer) == ("mse", "entropy")
    assert read("r.json").tensors.keys() == read("s.json").tensors.keys()
    assert read("r.json") != read("s.json")


def test_quantize_reports_what_it_did(quantized: Path, command: Command) -> None:
    code, out, err = command("quantize", "m.onnx", "-o", "a.onnx", "--ranges", "r.json")
    assert (code, err) == (0, "")
    lines = [line.split(maxsplit=1)[0] for line in out.splitlines()]
    assert lines == ["quantized", "size", "drift", "seconds", "recipe", "wrote"]
    assert "quantized  2 nodes: 2 Conv\n" in out
    options = ("--ranges", "r.json", "--override", "Conv_0=float", "--verify", "--json")
    found = printed(command("quantize", "m.onnx", "-o", "b.onnx", *options))
    assert found["quantized"] == {"Conv": 1}
    assert found["left"] == [["Conv_0", "kept float by request"]]
    assert found["bytes_after"] == (quantized / "b.onnx").stat().st_size
    _, out, _ = command("quantize", "m.onnx", "-o", "b.onnx", *options[:-1])
    assert "left       1: kept float by request (Conv_0)\n" in out


@pytest.mark.slow
def test_quantize_needs_nothing_but_the_model(there: Path, command: Command) -> None:
    found = printed(command("quantize", "m.onnx", "-o", "q.onnx", "--json"))
    assert found["quantized"] == {"Conv": 2}
    assert set(found["seconds"]) == {"load", "prepare", "synthesize", "calibrate", "passes", "save"}
    # On eight bits rounding noise is some 40 dB below a signal that fills the range.
    assert found["drift"]["sqnr"] > 15
    assert operators(there / "q.onnx") >= {"QuantizeLinear", "DequantizeLinear"}
    assert "BatchNormalization" not in operators(there / "q.onnx")
    Session(there / "q.onnx")


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
@pytest.mark.parametrize("source", ["synthetic", "data", "ranges"])
def test_outputs_say_how_they_were_made(
    quantized: Path, speech: Path, command: Command, target: str, source: str
) -> None:
    given = {
        "synthetic": ("--method", "random", "--seed", 3),
        "data": ("--data", speech),
        "ranges": ("--ranges", "r.json"),
    }
    options = ("--target", target, *given[source])
    for name in ("1.onnx", "2.onnx"):
        assert command("quantize", "m.onnx", "-o", name, *options)[0] == 0
    assert (quantized / "1.onnx").read_bytes() == (quantized / "2.onnx").read_bytes()
    found, before = recorded(quantized / "1.onnx"), recorded(quantized / "m.onnx")
    assert found["onnx_intq.version"] == onnx_intq.__version__
    assert found["onnx_intq.source_sha256"] == sha256(quantized / "m.onnx")
    assert found["onnx_intq.seed"] == ("3" if source == "synthetic" else "0")
    passes = registry.parse(found["onnx_intq.recipe"])
    assert registry.render(passes) == found["onnx_intq.recipe"]
    assert len(found["onnx_intq.ranges_sha256"]) == 64
    assert {key: found[key] for key in before} == before
    assert {FRONTEND_KEY, LABELS_KEY} == before.keys()
    if source == "ranges":
        assert found["onnx_intq.ranges_sha256"] == sha256(quantized / "r.json")
    elif source == "data":
        assert found["onnx_intq.data_sha256"] == fingerprint(speech)
    else:
        assert len(found["onnx_intq.data_sha256"]) == 64


def test_the_recipe_recorded_makes_the_same_model_again(quantized: Path, command: Command) -> None:
    recipe = recorded(quantized / "q.onnx")["onnx_intq.recipe"]
    command("quantize", "m.onnx", "-o", "2.onnx", "--ranges", "r.json", "--recipe", recipe)
    assert (quantized / "q.onnx").read_bytes() == (quantized / "2.onnx").read_bytes()
    found = printed(
        command("run", recipe, "m.onnx", "-o", "3.onnx", "--ranges", "r.json", "--json")
    )
    assert [each["pass"] for each in found["passes"]] == recipe.split(", ")
    tensors = [onnx.load(quantized / name).graph.initializer for name in ("q.onnx", "3.onnx")]
    assert list(tensors[0]) == list(tensors[1])


def test_run_writes_what_a_file_of_passes_says(there: Path, command: Command) -> None:
    (there / "recipe.txt").write_text("drop_identity,\nfold_bn\n")
    code, out, err = command("run", "@recipe.txt", "m.onnx", "-o", "o.onnx", "--verify")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if "exact" in line]
    assert [row[:3] for row in rows] == [["drop_identity", "0", "0"], ["fold_bn", "1", "0"]]
    assert "BatchNormalization" not in operators(there / "o.onnx")
    assert recorded(there / "o.onnx")["onnx_intq.recipe"] == "drop_identity, fold_bn"


def test_a_dry_run_writes_nothing(quantized: Path, command: Command) -> None:
    before = sorted(quantized.iterdir())
    recipe = "fold_bn, insert_qdq(keep=('Conv_0',)), quantize_weights"
    for output in ((), ("-o", "new.onnx")):
        options = ("--ranges", "r.json", "--verify", "--dry-run", *output)
        code, out, err = command("run", recipe, "m.onnx", *options)
        assert (code, err) == (0, "")
        rows = [line.split() for line in out.splitlines() if line.strip()]
        assert ["fold_bn", "1", "0"] in [row[:3] for row in rows]
        assert ["insert_qdq", "1", "1"] in [row[:3] for row in rows]
        assert "SQNR" in out
        assert "left       1: kept float by request (Conv_0)" in out
    assert sorted(quantized.iterdir()) == before


def test_passes_are_listed_and_shown(command: Command) -> None:
    code, out, err = command("passes")
    assert (code, err) == (0, "")
    assert all(name in out for name in registry.names())
    _, out, _ = command("passes", "insert_qdq")
    assert out.startswith("insert_qdq: Puts QuantizeLinear/DequantizeLinear pairs")
    assert "needs    bn-folded, calibrated\ngives    quantized\nexact    no\n" in out
    assert "options  target='ort', bits=8, keep=()" in out
    _, out, _ = command("passes", "fold_bn")
    assert "needs    nothing\ngives    bn-folded\nexact    yes\noptions  none\n" in out
    found = printed(command("passes", "--json"))
    assert [each["name"] for each in found["passes"]] == registry.names()


def test_check_exits_1_for_what_it_finds(quantized: Path, command: Command) -> None:
    assert command("check", "q.onnx", "--target", "ort") == (
        0,
        "ready for ort: no problem found\n",
        "",
    )
    code, out, err = command("check", "q.onnx", "--target", "tensorrt")
    assert code == 1
    assert re.search(r"\d+ problems for tensorrt", out)
    assert re.fullmatch(r"error: \d+ problems for target tensorrt\n", err)
    code, out, err = command("check", "q.onnx", "--target", "tensorrt", "--json")
    assert code == 1
    found = json.loads(out)
    assert found["target"] == "tensorrt"
    assert {"node", "rule", "message"} == found["problems"][0].keys()
    assert err == f"error: {len(found['problems'])} problems for target tensorrt\n"


def test_evaluate_counts_word_errors(quantized: Path, speech: Path, command: Command) -> None:
    options = ("--manifest", speech, "--against", "m.onnx", "--threads", 1)
    found = printed(command("evaluate", "q.onnx", *options, "--json"))
    assert (found["utterances"], found["words"]) == (2, 4)
    assert found["wer"] == 100 * found["errors"] / found["words"]
    assert found["differs"] is not None
    code, out, err = command("evaluate", "q.onnx", *options)
    assert (code, err) == (0, "")
    assert re.search(r"all\s+2\s+4\s+\d+", out)
    _, out, _ = command("evaluate", "m.onnx", "--manifest", speech)
    assert out.rstrip().endswith("-")


def test_evaluate_takes_what_a_model_does_not_record(
    there: Path, speech: Path, command: Command
) -> None:
    proto = onnx.load("m.onnx")
    settings = {entry.key: entry.value for entry in proto.metadata_props}
    del proto.metadata_props[:]
    onnx.save(proto, "bare.onnx")
    (there / "frontend.json").write_text(settings[FRONTEND_KEY])
    (there / "labels.json").write_text(settings[LABELS_KEY])
    given = ("--frontend", "frontend.json", "--labels", "labels.json")
    bare = printed(command("evaluate", "bare.onnx", "--manifest", speech, *given, "--json"))
    assert bare == printed(command("evaluate", "m.onnx", "--manifest", speech, "--json"))


def test_cost_counts(quantized: Path, command: Command) -> None:
    found = printed(command("cost", "m.onnx", "--seconds", 1, "--json"))
    # A second is 100 frames; 8 x 4 x 3 and 3 x 8 weights.
    assert found["macs"] == 100 * (96 + 24)
    _, out, _ = command("cost", "q.onnx", "--seconds", 1)
    assert "MACs        0.000 G for 1 s of audio" in out
    assert re.search(r"Conv\s+2\s", out)


def test_bench_compares(quantized: Path, command: Command) -> None:
    options = ("--seconds", 0.1, "--rounds", 2)
    found = printed(command("bench", "m.onnx", "q.onnx", *options, "--json"))
    first, second = found["models"]
    assert (first["model"], first["ratio"], second["rounds"]) == ("m.onnx", 1, 2)
    _, out, _ = command("bench", "m.onnx", "q.onnx", *options)
    assert "onnxruntime on the CPU, 0.1 s of audio, 2 rounds in turn" in out
    assert "q.onnx" in out


@pytest.mark.slow
def test_export_writes_a_model_of_the_zoo(there: Path, command: Command) -> None:
    assert command("export", "quartznet5x5", "-o", "e.onnx") == (0, "", "wrote e.onnx\n")
    assert "BatchNormalization" in operators(there / "e.onnx")
    assert {FRONTEND_KEY, LABELS_KEY} <= recorded(there / "e.onnx").keys()
