"""`cost` from the command line, with and without a device."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

Command = Callable[..., tuple[int, str, str]]
COUNTED = ("macs", "bops")
QDQ_AND_INTEGER = ("q.onnx", "i.onnx")


@pytest.fixture
def there(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the recognizer m.onnx, made the current one."""
    monkeypatch.chdir(tiny.parent)
    return tiny.parent


def printed(answer: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = answer
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_device_gives_bounds(there: Path, command: Command) -> None:
    code, out, err = command("cost", "m.onnx", "--device", "t4", "--layers", 1)
    assert (code, err) == (0, "")
    assert "NVIDIA T4: at least so long for 10 s of audio" in out
    assert "the costliest 1 of 2" in out
    one = printed(command("cost", "m.onnx", "--device", "cpu-vnni", "--ghz", 2, "--json"))
    four = ("--cores", 2, "--ghz", 4, "--batch", 3)
    several = printed(command("cost", "m.onnx", "--device", "cpu-vnni", *four, "--json"))
    assert several["macs"] == 3 * one["macs"]
    titles = [found["roofline"]["title"] for found in (one, several)]
    assert titles == ["cpu-vnni, 1 core at 2 GHz", "cpu-vnni, 2 cores at 4 GHz"]


@pytest.mark.parametrize("bits", [6, 8])
def test_an_integer_only_model_costs_what_its_qdq_model_does(
    there: Path, command: Command, bits: int
) -> None:
    quantized = command("quantize", "m.onnx", "-o", "q.onnx", "--method", "random", "-w", bits)
    assert quantized[0] == 0
    lower = ("--target", "integer", "--allow-float")
    assert command("quantize", "q.onnx", "-o", "i.onnx", *lower)[0] == 0
    assert "ConvInteger" in {node.op_type for node in onnx.load("i.onnx").graph.node}
    found = [printed(command("cost", name, "--device", "t4", "--json")) for name in QDQ_AND_INTEGER]
    qdq, integer = ({key: each[key] for key in COUNTED} for each in found)
    assert qdq == integer
    assert qdq["bops"] == qdq["macs"] * 8 * bits
    assert found[0]["roofline"] == found[1]["roofline"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ghz", 3), "--ghz has no effect without --device cpu-vnni"),
        (("--device", "t4", "--cores", 2), "--cores has no effect without --device cpu-vnni"),
        (("--device", "tpu"), "'tpu' is not one of 't4'"),
        (("--batch", 0), "0 is not in the range"),
        (("--device", "cpu-vnni", "--ghz", "inf"), "inf is not finite"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    there: Path, command: Command, options: tuple[object, ...], message: str
) -> None:
    code, out, err = command("cost", "m.onnx", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
