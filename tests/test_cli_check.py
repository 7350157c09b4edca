"""`check --integer-only` and `--parser` from the command line; `--target` mostly in test_cli."""

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

Command = Callable[..., tuple[int, str, str]]
GOOD = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2, 2] x) => (float[2, 2] y)
        <float s = {0.1}, uint8 z = {128}, int32 zero = {0}, uint8[2, 2] w = {1, 2, 3, 4}> {
            q = QuantizeLinear(x, s, z)
            p = MatMulInteger(q, w, z)
            r = Max(p, zero)
            y = DequantizeLinear(r, s, zero)
        }"""


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, made the current one, with an integer-only `good.onnx` and a float `bad.onnx`."""
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx.parser.parse_model(GOOD), "good.onnx")
    bad = GOOD.replace("r = Max(p, zero)", "f = Cast<to = 1>(p) g = Relu(f) r = Cast<to = 6>(g)")
    onnx.save(onnx.parser.parse_model(bad), "bad.onnx")
    return tmp_path


def test_an_integer_only_model_passes(there: Path, command: Command) -> None:
    said = "integer-only: 4 nodes, 9 tensors, all integer but the boundary "
    said += "(1 QuantizeLinear, 1 DequantizeLinear)\n"
    said += "overflow: none, every result stays within its type\n"
    assert command("check", "good.onnx", "--integer-only") == (0, said, "")
    code, out, err = command("check", "good.onnx", "--integer-only", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["integer_only"]["proven"] is True


def test_a_model_that_is_not_integer_only_fails_with_its_nodes(
    there: Path, command: Command
) -> None:
    code, out, err = command("check", "bad.onnx", "--integer-only")
    assert (code, err) == (1, "error: 3 places are not integer-only\n")
    rows = [line.split()[:2] for line in out.splitlines()]
    assert [row for row in rows if row[1:] in (["f"], ["g"])] == [
        ["Cast_2", "f"],
        ["Relu_3", "g"],
        ["Cast_4", "g"],
    ]
    code, out, _ = command("check", "bad.onnx", "--integer-only", "--json")
    assert code == 1
    assert [f["node"] for f in json.loads(out)["integer_only"]["findings"]] == [
        "Cast_2",
        "Relu_3",
        "Cast_4",
    ]


def test_a_possible_overflow_is_told_whatever_the_file_says_about_types(
    there: Path, command: Command
) -> None:
    risky = GOOD.replace("r = Max(p, zero)", "a = Mul(p, p) b = Mul(a, p) r = Mul(b, p)")
    proto = onnx.parser.parse_model(risky)
    lie = onnx.helper.make_tensor_value_info("r", onnx.TensorProto.INT64, [2, 2])
    proto.graph.value_info.append(lie)
    onnx.save(proto, "risky.onnx")
    code, out, err = command("check", "risky.onnx", "--integer-only")
    assert (code, err) == (0, "")
    low, high = 6 * -128, 6 * 127  # 6 is the largest sum of a column of weights
    assert out.splitlines()[1:] == [
        "overflow: not excluded by intervals at 1 nodes, such as",
        f"  Mul_4: Mul: {low**3 * high}..{low**4} may leave int32",
    ]


def test_both_checks_in_one(there: Path, command: Command) -> None:
    both = ("--target", "tensorrt", "--integer-only")
    code, out, err = command("check", "bad.onnx", *both, "--json")
    found = json.loads(out)
    count = len(found["problems"])
    assert count > 0
    assert (code, err) == (
        1,
        f"error: {count} problems for target tensorrt; 3 places are not integer-only\n",
    )
    code, out, err = command("check", "good.onnx", "--target", "tensorrt", "--integer-only")
    assert code == 1
    assert "integer-only: 4 nodes" in out
    assert err.endswith("problems for target tensorrt\n")


def test_bad_input_exits_2(there: Path, command: Command) -> None:
    code, _, err = command("check", "good.onnx")
    assert code == 2
    assert err == ("error: nothing to check; expected --target, --integer-only or both; give one\n")
    (there / "junk.onnx").write_text("no model")
    for name in ("junk.onnx", "absent.onnx"):
        code, out, err = command("check", name, "--integer-only")
        assert (code, out) == (2, "")
        assert err.startswith("error: ")


QDQ = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 16, n] x) => (float[1, 16, n] y) <float s = {0.1}, int8 z = {0}> {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        y = Relu(d)
    }"""
needs_library = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install 'onnx_intq[rtx]'"
)
ASK = ("check", "qdq.onnx", "--target", "tensorrt", "--parser")


@pytest.fixture
def qdq(there: Path) -> Path:
    """The file qdq.onnx, ready for TensorRT, in the current folder."""
    onnx.save(onnx.parser.parse_model(QDQ), "qdq.onnx")
    return there


@needs_library
def test_nvidias_parser_is_asked(qdq: Path, command: Command) -> None:
    code, out, err = command(*ASK)
    assert (code, err) == (0, "")
    assert re.fullmatch(
        r"ready for tensorrt: no problem found\nparser: tensorrt-rtx [\d.]+ takes it, \d+ layers\n",
        out,
    )
    code, out, _ = command(*ASK, "--integer-only", "--json")
    assert code == 1
    found = json.loads(out)
    assert found.keys() == {"target", "problems", "warnings", "parser", "integer_only"}
    assert found["parser"]["refusals"] == 0


@needs_library
def test_what_nvidias_parser_refuses_names_our_node(qdq: Path, command: Command) -> None:
    onnx.save(onnx.parser.parse_model(QDQ.replace("z = {0}", "z = {3}")), "qdq.onnx")
    code, out, err = command(*ASK, "--json")
    assert (code, err) == (1, "error: 2 problems for target tensorrt\n")
    by_rule = {problem["rule"]: problem for problem in json.loads(out)["problems"]}
    assert by_rule.keys() == {"zero-point", "parser"}
    assert {problem["node"] for problem in by_rule.values()} == {"QuantizeLinear_0"}
    assert "rule zero-point" in by_rule["parser"]["message"]
    _, out, _ = command(*ASK)
    assert "parser: 1, zero-point: 1\n" in out
    assert out.endswith("refuses it\n")


def test_a_missing_library_is_named_in_one_line(
    qdq: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (qdq / "stub").mkdir()
    (qdq / "stub" / "tensorrt_rtx.py").write_text("raise ImportError('not installed')")
    monkeypatch.syspath_prepend(str(qdq / "stub"))
    code, out, err = command(*ASK)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.endswith("; run: pip install 'onnx_intq[rtx]'\n")


@pytest.mark.parametrize("target", [(), ("--target", "ort")])
def test_the_parser_is_for_tensorrt_alone(
    there: Path, command: Command, target: tuple[str, ...]
) -> None:
    code, out, err = command("check", "good.onnx", "--integer-only", "--parser", *target)
    assert (code, out) == (2, "")
    assert err == (
        "error: --parser reads models for TensorRT; expected --target tensorrt; add it\n"
    )


def test_warnings_are_told_and_pass(qdq: Path, command: Command) -> None:
    product = "v = DequantizeLinear(w, s, z) y = Conv(d, v)"
    text = QDQ.replace("16, n", "12, n").replace("y = Relu(d)", product)
    proto = onnx.parser.parse_model(text)
    weight = np.ones((12, 12, 1), np.int8)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, "small.onnx")
    code, out, err = command("check", "small.onnx", "--target", "tensorrt")
    assert (code, err) == (0, "")
    assert out.startswith("ready for tensorrt: no problem found\n1 warning for tensorrt\n")
    assert out.endswith("small-convolution: 1\n")
