"""`compress`: files that are smaller and compute the same, or nearly, and say what was done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_intq.frontend import Frontend
from onnx_intq.graph import load, metadata
from onnx_intq.packing import decoded, unpack
from onnx_intq.runtime import Session, optimized_ops
from onnx_intq.transducer_folder import PARTS
from onnx_intq.verify import small_feeds

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `m.onnx`, whose weights are large enough to be packed."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        m (float[batch, 32, time] audio_signal) => (float[batch, time, 8] log_probs) {
            [first] c = Conv<pads = [1, 1]>(audio_signal, w1)
            n = BatchNormalization(c, gamma, beta, mean, variance)
            r = Relu(n)
            [second] l = Conv(r, w2, b2)
            t = Transpose<perm = [0, 2, 1]>(l)
            log_probs = LogSoftmax(t)
        }""")
    random = np.random.default_rng(0)
    weights = {
        "w1": random.standard_normal((64, 32, 3)),
        "gamma": random.uniform(0.5, 2, 64),
        "beta": random.standard_normal(64),
        "mean": random.standard_normal(64),
        "variance": random.uniform(50, 200, 64),
        "w2": random.standard_normal((8, 64, 1)),
        "b2": random.standard_normal(8),
    }
    for name, values in weights.items():
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    onnx.save(model, tmp_path / "m.onnx")
    feeds = {
        f"{number:04}/audio_signal": random.standard_normal((2, 32, 50)).astype(np.float32)
        for number in range(3)
    }
    np.savez(tmp_path / "f.npz", **feeds)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(path: str | Path) -> np.ndarray:
    found = Session(path, threads=1)
    return found.run(small_feeds(load(path)))["log_probs"]


def printed(answer: tuple[int, str, str]) -> dict[str, object]:
    code, out, err = answer
    assert (code, err) == (0, "")
    found: dict[str, object] = json.loads(out)
    return found


@pytest.mark.parametrize("codebook", ["lloyd", "mu-law", "uniform"])
def test_a_float_model_gets_few_bits(there: Path, command: Command, codebook: str) -> None:
    options = ("--bits", 4, "--override", "second=6", "--codebook", codebook)
    found = printed(command("compress", "m.onnx", "-o", "c.onnx", *options, "--json"))
    assert (found["coded"], found["packed"], found["left"]) == (2, {"4": 1}, [])
    assert found["bytes_after"] == Path("c.onnx").stat().st_size
    assert int(str(found["bytes_after"])) < 0.25 * int(str(found["bytes_before"]))
    drift = found["drift"]
    assert isinstance(drift, dict)
    assert drift["sqnr"] > 12
    recorded = metadata(load("c.onnx"))
    assert recorded["onnx_intq.recipe"] == found["recipe"]
    assert json.loads(recorded["onnx_intq.bits"]) == {"w1_q": 4, "w2_q": 6}
    again = command("compress", "m.onnx", "-o", "again.onnx", *options)
    assert again[0] == 0
    assert Path("again.onnx").read_bytes() == Path("c.onnx").read_bytes()


def test_data_choose_the_roundings(there: Path, command: Command) -> None:
    plain = printed(command("compress", "m.onnx", "-o", "c.onnx", "--bits", 3, "--json"))
    given = ("--bits", 3, "--data", "f.npz", "--json")
    boosted = printed(command("compress", "m.onnx", "-o", "b.onnx", *given))
    assert "round_weights(compensate=True), correct_bias, pack_weights" in str(boosted["recipe"])
    assert plain["packed"] == boosted["packed"]
    wanted, *found = (result(name) for name in ("m.onnx", "c.onnx", "b.onnx"))
    errors = [np.square(each - wanted).sum() for each in found]
    assert errors[1] < 0.7 * errors[0]
    assert "onnx_intq.data_sha256" in metadata(load("b.onnx"))


@pytest.mark.parametrize("target", ["ort", "integer"])
def test_a_quantized_model_is_packed_as_it_is(there: Path, command: Command, target: str) -> None:
    made = command("quantize", "m.onnx", "-o", "q.onnx", "-w", 5, "--data", "f.npz",
                   "--target", target)  # fmt: skip
    assert made[0] == 0
    code, out, _ = command("compress", "q.onnx", "-o", "p.onnx")
    assert code == 0
    assert "packed     1 constants: 1 of 5 bits" in out
    assert "SQNR inf dB, largest 0, on random input" in out
    assert "coded" not in out
    assert np.array_equal(result("q.onnx"), result("p.onnx"))
    assert optimized_ops("q.onnx") == optimized_ops("p.onnx")
    assert command("compress", "p.onnx", "-o", "again.onnx")[0] == 0  # packed once more
    assert list(map(str, load("again.onnx").nodes)) == list(map(str, load("p.onnx").nodes))


def test_what_reads_models_reads_packed_ones(there: Path, command: Command) -> None:
    assert command("quantize", "m.onnx", "-o", "q.onnx", "-w", 5, "--data", "f.npz")[0] == 0
    assert command("compress", "q.onnx", "-o", "p.onnx")[0] == 0
    plain, packed = (printed(command("cost", f"{n}.onnx", "--json")) for n in "qp")
    for key in ("parameters", "macs", "bops"):
        assert plain[key] == packed[key]
    saved = int(str(plain["weight_bytes"])) - int(str(packed["weight_bytes"]))
    assert 0.9 * 64 * 96 * 3 / 8 < saved < 64 * 96 * 3 / 8
    code, out, _ = command("check", "p.onnx", "--target", "ort")
    assert (code, out) == (0, "ready for ort: no problem found\n")
    assert command("quantize", "p.onnx", "-o", "i.onnx", "--target", "integer")[0] == 0
    assert command("quantize", "q.onnx", "-o", "j.onnx", "--target", "integer")[0] == 0
    assert np.array_equal(result("i.onnx"), result("j.onnx"))
    assert command("compress", "i.onnx", "-o", "ip.onnx")[0] == 0
    code, out, _ = command("check", "ip.onnx", "--integer-only")
    assert (code, "overflow: none" in out) == (0, True)


@pytest.mark.parametrize("target", ["ort", "tensorrt", "integer"])
def test_a_compressed_model_is_quantized(there: Path, command: Command, target: str) -> None:
    assert command("compress", "m.onnx", "-o", "c.onnx", "--bits", 4)[0] == 0
    options = ("--target", target, "--data", "f.npz")
    assert command("quantize", "c.onnx", "-o", "q.onnx", *options)[0] == 0
    given, made = load("c.onnx"), load("q.onnx")
    unpack(given)
    stored = given.tensors()["w1_q"].values
    found = [t.values for t in made.tensors().values() if t.shape == stored.shape and not t.inputs]
    weights = [values.astype(int) for values in found if values.dtype in (np.int8, np.uint8)]
    assert any(np.array_equal(w - shift, stored) for w in weights for shift in (0, 128))
    if target != "integer":
        recorded = json.loads(metadata(made)["onnx_intq.bits"])
        assert set(recorded.values()) == {4}
    wanted = result("c.onnx")
    error = np.square(result("q.onnx") - wanted).sum() / np.square(wanted).sum()
    assert error < 0.01
    code, _, err = command("quantize", "c.onnx", "-o", "e.onnx", *options, "--boost", "equalize")
    assert (code, "weights are integers already" in err) == (2, True)


def test_tensorrt_is_told_to_unpack(there: Path, command: Command) -> None:
    options = ("--target", "tensorrt", "-w", 5, "--data", "f.npz")
    assert command("quantize", "m.onnx", "-o", "q.onnx", *options)[0] == 0
    assert command("compress", "q.onnx", "-o", "p.onnx")[0] == 0
    code, out, _ = command("check", "p.onnx", "--target", "tensorrt")
    assert (code, "1 weights are packed" in out, "BitShift" in out) == (1, True, False)
    assert command("run", "unpack_weights", "p.onnx", "-o", "u.onnx")[0] == 0
    assert command("check", "u.onnx", "--target", "tensorrt")[0] == 0
    assert np.array_equal(result("q.onnx"), result("u.onnx"))


def test_weights_that_were_not_compressed_get_their_grid(there: Path, command: Command) -> None:
    kept = ("--bits", 4, "--override", "second=float")
    code, out, _ = command("compress", "m.onnx", "-o", "c.onnx", *kept)
    assert (code, "left       1: its weight is to stay float (second)" in out) == (0, True)
    assert command("calibrate", "c.onnx", "--data", "f.npz", "-o", "r.json")[0] == 0
    assert command("quantize", "c.onnx", "-o", "q.onnx", "--ranges", "r.json", "-w", 6)[0] == 0
    recorded = json.loads(metadata(load("q.onnx"))["onnx_intq.bits"])
    assert sorted(recorded.values()) == [4, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("m.onnx -o c.onnx", "its weights are float; expected how many bits to give them; add"),
        ("q.onnx -o c.onnx --bits 4", "weights are integers already, which can only be packed"),
        ("q.onnx -o c.onnx", "nothing can be packed; expected weights of less than 8 bits"),
        ("m.onnx -o m.onnx --bits 4", "output is the input"),
        ("m.onnx -o c.onnx --bits 9", "9 is not in the range 1<=x<=8"),
        ("m.onnx -o c.onnx --codebook uniform", "--codebook has no effect without --bits"),
        ("m.onnx -o c.onnx --bits 4 --override first=a16", "about activations, which stay float"),
        ("m.onnx -o c.onnx --bits 4 --override third=5", "no node matches 'third'; expected names"),
        ("m.onnx -o c.onnx --bits 4 --override first=9", "expected NODES=BITS, 1..8"),
        ("n.onnx -o c.onnx --bits 4", "no such file"),
        ("m.onnx -o no/c.onnx --bits 4", "folder does not exist"),
        ("m.onnx -o c.onnx --bits 4 --data n.npz", "no such file"),
    ],
)
def test_errors_are_one_line(there: Path, command: Command, arguments: str, message: str) -> None:
    assert command("quantize", "m.onnx", "-o", "q.onnx", "--data", "f.npz")[0] == 0
    code, out, err = command("compress", *arguments.split())
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("c.onnx").exists()


def test_a_pattern_for_a_model_without_float_weights(there: Path, command: Command) -> None:
    assert command("quantize", "m.onnx", "-o", "q.onnx", "--data", "f.npz")[0] == 0
    arguments = ("q.onnx", "-o", "c.onnx", "--bits", 4, "--override", "first=3")
    assert "float weights; correct it" in command("compress", *arguments)[2]


def test_a_folder_is_compressed_whole(rnnt: Path, command: Command) -> None:
    """Its weights are so small that coding pays, and packing does not."""
    output = rnnt.with_name("c")
    code, out, err = command("compress", rnnt, "-o", output, "--bits", 1)
    assert (code, err) == (0, "")
    assert "all parts" in out
    assert sorted(p.name for p in output.iterdir()) == sorted(f"{part}.onnx" for part in PARTS)
    found = printed(command("compress", rnnt, "-o", output, "--bits", 2, "--json"))
    parts = found["parts"]
    assert isinstance(parts, dict)
    assert set(parts) == set(PARTS)
    assert all(part["coded"] for part in parts.values())
    code, _, err = command("compress", output, "-o", rnnt.with_name("p"))
    assert (code, "nothing can be packed" in err) == (2, True)
    assert not rnnt.with_name("p").exists()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """The folder of an RNN-T whose weights are large enough to be packed."""
    torch = pytest.importorskip("torch")
    from onnx_intq.models.rnnt import Rnnt, RnntConfig
    from onnx_intq.models.rnnt_export import export_rnnt

    config = RnntConfig(
        labels=("a", " "), features=4, factor=3, width=64, predictor=32, joint=5, predictor_layers=1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Rnnt(config).eval()
    export_rnnt(network, tmp_path / "large", frontend=Frontend(sample_rate=8000, features=4))
    return tmp_path / "large"


def test_a_large_folder_is_packed(large: Path, there: Path, command: Command) -> None:
    found = printed(command("compress", large, "-o", "c", "--bits", 5, "--json"))
    eight = printed(command("compress", large, "-o", "e", "--bits", 8, "--json"))
    sizes = [int(str(each["bytes_after"])) for each in (found, eight)]
    assert sizes[0] < 0.8 * sizes[1]
    assert command("compress", "c", "-o", "p")[0] == 0
    assert len(list(decoded(load("p/encoder.onnx")))) == 4
    chosen = ("--bits", 5, "--override", "*LSTM*=3", "--override", "*enc*=4")
    found = printed(command("compress", large, "-o", "c", *chosen, "--json"))
    assert "'*LSTM*', 3" in json.dumps(found)
    for arguments, message in [
        (("--bits", 5, "--override", "*gru*=4"), "no node matches '*gru*'"),
        (("--bits", 5, "--data", "f.npz"), "feeds for an RNN-T"),
        (("--bits", 5, "-o", large), "output is the input folder"),
    ]:
        code, _, err = command("compress", large, "-o", "x", *arguments)
        assert (code, message in err) == (2, True)
    assert not Path("x").exists()


def test_folders_that_cannot_be_compressed(rnnt: Path, command: Command) -> None:
    def refusal(*arguments: object) -> str:
        code, _, err = command("compress", rnnt, *arguments)
        assert (code, err.count("\n")) == (2, 1)
        return err

    output = rnnt.with_name("c")
    assert "rnnt: its weights are float; expected how many bits" in refusal("-o", output)
    assert "is three ONNX files" in refusal("-o", f"{output}.onnx", "--bits", 5)
    shutil.copy(rnnt / "joint.onnx", rnnt / "encoder.onnx")
    assert "encoder.onnx: takes encoded, predicted" in refusal("-o", output, "--bits", 5)


def test_weights_alone_are_a_warning(there: Path, command: Command) -> None:
    assert command("compress", "m.onnx", "-o", "c.onnx", "--bits", 4)[0] == 0
    code, out, err = command("check", "c.onnx", "--target", "ort")
    assert (code, err) == (0, "")
    assert "1 warning for ort" in out
    assert "the weights alone, 2, are integers" in out
    code, out, _ = command("check", "c.onnx", "--target", "tensorrt", "--json")
    assert code == 1
    rules = [problem["rule"] for problem in json.loads(out)["problems"]]
    assert rules == ["packed-weights", "weights-only"]
    assert command("quantize", "c.onnx", "-o", "q.onnx", "--data", "f.npz")[0] == 0
