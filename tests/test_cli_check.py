"""`check --integer-only` from the command line; `--target` is tested with the other commands."""

import json
from collections.abc import Callable
from pathlib import Path

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
