"""The integer target as library functions: what it starts from, refuses and records."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_intq import feeds, recipes
from onnx_intq.calibrate import calibrate
from onnx_intq.graph import load, metadata
from onnx_intq.integer_only import examine
from onnx_intq.lowering import GRIDS_KEY
from onnx_intq.progress import Tick
from onnx_intq.quantize import (
    is_quantized,
    known_facts,
    prepared,
    quantize,
    require_qdq,
    run_recipe,
)
from onnx_intq.real_io import RealSession
from onnx_intq.registry import parse, render
from onnx_intq.runtime import Session
from onnx_intq.source import Source
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY
from onnx_intq.summary import Summary
from onnx_intq.transform import CheckFailed, IntqError

LOWER = recipes.pipeline("integer", quantized=True)
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
PAIR = "p = QuantizeLinear(x, s, z) a = DequantizeLinear(p, s, z)"


@contextmanager
def silent(title: str) -> Iterator[Tick]:
    yield lambda done, total: None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Feeds for the tiny model: three batches."""
    random = np.random.default_rng(0)
    batches = [
        {"audio_signal": random.standard_normal((2, 4, 30)).astype(np.float32)} for _ in range(3)
    ]
    feeds.write(tmp_path / "data.npz", batches)
    return tmp_path / "data.npz"


@pytest.fixture
def qdq(tiny: Path, data: Path) -> Path:
    """The tiny model quantized for onnxruntime."""
    output = tiny.with_name("q.onnx")
    quantize(tiny, output, recipes.pipeline("ort"), Source(data=data), bar=silent)
    return output


def text_model(
    path: Path, body: str, inputs: str = "float[2, 4] x", y: str = "float[2, 4] y"
) -> Path:
    """A Q/DQ model: p and a are the quantized and the dequantized x, and `body` makes y."""
    proto = onnx.parser.parse_model(f"{HEADER} g ({inputs}) => ({y}) {{ {PAIR} {body} }}")
    constants = {"s": np.float32(0.1), "z": np.uint8(128), "k": np.ones(4, np.float32)}
    for name, values in constants.items():
        tensor = onnx.numpy_helper.from_array(np.asarray(values), name)
        proto.graph.initializer.append(tensor)
    onnx.save(proto, path)
    return path


def lower(model: Path, **options: Any) -> Summary:
    return quantize(model, model.with_name("i.onnx"), LOWER, Source(), bar=silent, **options)


def test_a_float_model_becomes_integer_only(tiny: Path, data: Path) -> None:
    output = tiny.with_name("i.onnx")
    passes = recipes.pipeline("integer")
    done = quantize(tiny, output, passes, Source(data=data), verify=True, bar=silent)
    assert (done.integer_only, done.quantized, done.remaining) == ((), {"ConvInteger": 2}, ())
    assert [r.spec for r in done.reports] == passes
    assert list(done.seconds) == ["load", "prepare", "calibrate", "passes", "save"]
    proof = examine(onnx.load(output))
    assert (proof.findings, proof.quantizers, proof.dequantizers) == ((), 1, 1)
    found = metadata(load(output))
    assert {FRONTEND_KEY, LABELS_KEY, "onnx_intq.data_sha256", "onnx_intq.observer"} <= found.keys()
    grids = json.loads(found[GRIDS_KEY])
    assert {name for name, _, _ in grids.values()} >= {"audio_signal", "log_probs"}
    assert grids.keys() <= load(output).tensors().keys()
    # Eight bits: 40 dB and more in a Conv or two.
    assert done.drift.sqnr > 20


def test_a_quantized_model_needs_no_data_and_gives_the_same(
    tiny: Path, data: Path, qdq: Path
) -> None:
    done = lower(qdq)
    assert (done.integer_only, done.quantized) == ((), {"ConvInteger": 2})
    assert list(done.seconds) == ["load", "prepare", "passes", "save"]
    direct = tiny.with_name("d.onnx")
    quantize(tiny, direct, recipes.pipeline("integer"), Source(data=data), bar=silent)
    x = {"audio_signal": np.random.default_rng(9).standard_normal((3, 4, 90)).astype(np.float32)}
    lowered = tiny.with_name("i.onnx")
    one, other = (Session(path, threads=1).run(x)["log_probs"] for path in (lowered, direct))
    np.testing.assert_array_equal(one, other)
    assert metadata(load(lowered))[FRONTEND_KEY] == metadata(load(tiny))[FRONTEND_KEY]
    # Nothing moves but the rounding of log-softmax to 16 bits, and its polynomial.
    assert done.drift.largest < 2.0**-8


@pytest.mark.parametrize("mode", ["poly", "paper", "lut"])
def test_integers_may_come_and_go(qdq: Path, mode: str) -> None:
    passes = recipes.pipeline("integer", quantized=True, nonlinear=mode)
    quantize(qdq, qdq.with_name("f.onnx"), passes, Source(), bar=silent)
    passes = recipes.pipeline("integer", quantized=True, nonlinear=mode, io="int8")
    done = quantize(qdq, qdq.with_name("i.onnx"), passes, Source(), verify=True, bar=silent)
    proof = examine(onnx.load(qdq.with_name("i.onnx")))
    assert (done.integer_only, proof.quantizers, proof.dequantizers) == ((), 0, 0)
    x = {"audio_signal": np.random.default_rng(9).standard_normal((3, 4, 90)).astype(np.float32)}
    real = RealSession(qdq.with_name("i.onnx"), threads=1)
    assert real.inputs[0].dtype == np.float32
    expected = Session(qdq.with_name("f.onnx"), threads=1).run(x)["log_probs"]
    np.testing.assert_array_equal(real.run(x)["log_probs"], expected)


def test_an_integer_only_model_is_refused(qdq: Path) -> None:
    """Options would have no effect on it, and its metadata would say they had."""
    lower(qdq)
    first = qdq.with_name("i.onnx").rename(qdq.with_name("first.onnx"))
    with pytest.raises(IntqError, match="the model is integer-only already; expected a float or"):
        lower(first)
    assert not qdq.with_name("i.onnx").exists()


def test_data_gives_the_ranges_a_qdq_file_lacks(tmp_path: Path) -> None:
    """Abs reads the input in float, so that no Q/DQ pair tells its range."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4, t] x) => (float[n, 4, t] y) { a = Abs(x) h = Conv(a, w) y = Relu(h) }"""
    proto = onnx.parser.parse_model(text)
    w = np.random.default_rng(0).standard_normal((4, 4, 1)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    net, qdq, output = (tmp_path / f"{name}.onnx" for name in ("float", "qdq", "integer"))
    onnx.save(proto, net)
    data = tmp_path / "data.npz"
    batch = {"x": np.random.default_rng(1).standard_normal((2, 4, 50)).astype(np.float32)}
    feeds.write(data, [batch])
    quantize(net, qdq, recipes.pipeline("ort"), Source(data=data), bar=silent)
    passes = recipes.pipeline("integer", quantized=True)
    with pytest.raises(CheckFailed, match="the range of its result 'x' is unknown"):
        quantize(qdq, output, passes, Source(), bar=silent)
    done = quantize(qdq, output, passes, Source(data=data), bar=silent)
    assert done.integer_only == ()
    assert done.drift_on == "the first batch"
    assert done.drift.sqnr > 30


def test_recipes_of_ones_own_may_lower(tiny: Path, qdq: Path) -> None:
    ranges, output = tiny.with_name("r.json"), tiny.with_name("o.onnx")
    calibrate(prepared(tiny), feeds.read(tiny.with_name("data.npz"))).write(ranges)
    passes = parse(render(recipes.pipeline("integer")))
    run_recipe(tiny, output, passes, Source(ranges=ranges), verify=True, bar=silent)
    assert examine(onnx.load(output)).findings == ()
    run_recipe(qdq, output, parse("complete_qdq, integerize_conv"), Source(), bar=silent)
    assert known_facts(load(output)) == {"bn-folded", "quantized", "complete"}
    run_recipe(
        output,
        qdq.with_name("p.onnx"),
        parse("integerize_softmax, integerize_move"),
        Source(),
        bar=silent,
    )
    again = qdq.with_name("p.onnx")
    run_recipe(again, output, parse("integerize_boundary"), Source(), bar=silent)
    assert examine(onnx.load(output)).findings == ()


FLOATS = [
    (
        "b = QuantizeLinear<axis = 1>(a, k) y = DequantizeLinear<axis = 1>(b, k)",
        "node 'DequantizeLinear_1', tensor 'a': dequantizes inside the graph; expected .*; let it",
    ),
    ("y = Tan(a)", "'Tan_2' has no integer form .*the range of its result 'y' is unknown"),
    ("b = Neg(x) y = Tan(b)", "'x' has no integer form .*range of its result 'x' is unknown"),
    ("y = Hardmax(a)", "'Hardmax_2' has no integer form: .*range of its result 'y' is unknown"),
    ("y = Mean(a, a) c = Relu(y)", "'Mean_2' has no integer form: the range of its result 'y'"),
    (
        "y = Sum(a, a)",
        "'Sum_2' has no integer form: no pass makes integers of Sum; expected none",
    ),
]


@pytest.mark.parametrize(("body", "message"), FLOATS)
def test_what_stays_float_is_named_or_allowed(tmp_path: Path, body: str, message: str) -> None:
    model, output = text_model(tmp_path / "m.onnx", body), tmp_path / "i.onnx"
    with pytest.raises(CheckFailed, match=message) as caught:
        lower(model)
    assert "--allow-float" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not output.exists()
    done = lower(model, allow_float=True)
    assert done.integer_only
    assert all(": " in line for line in done.integer_only)
    before = Session(model, threads=1).run({"x": np.ones((2, 4), np.float32)})["y"]
    after = Session(output, threads=1).run({"x": np.ones((2, 4), np.float32)})["y"]
    assert np.abs(after - before).max() <= 1e-3


def test_bodies_are_named(tmp_path: Path) -> None:
    body = """y = If(b) <then_branch = t () => (float[2, 4] u) { u = Neg(a) },
        else_branch = e () => (float[2, 4] w) { w = Identity(a) }>"""
    model = text_model(tmp_path / "m.onnx", body, "float[2, 4] x, bool b")
    with pytest.raises(CheckFailed, match=r"'If_2' has no integer form.*; .*--allow-float"):
        lower(model)


def test_models_with_quantizers_are_told_from_others(tiny: Path, qdq: Path) -> None:
    assert not is_quantized(tiny)
    assert is_quantized(qdq)
    require_qdq(load(qdq))
    with pytest.raises(IntqError, match="no such file"):
        is_quantized(tiny.with_name("nowhere.onnx"))


def test_other_forms_of_quantized_models_are_refused(tmp_path: Path, foreign: Any) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2, 4] x) => (float[2, 4] y)
        { y = MatMul(x, w) }"""
    )
    w = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    feed = [{"x": np.ones((2, 4), np.float32)}]
    path, output = tmp_path / "foreign.onnx", tmp_path / "i.onnx"
    foreign(proto, feed, extra_options={"UseQDQContribOps": True})
    message = (
        r"equantizeLinear .* is of the domain 'com.microsoft'; expected the default domain; qu"
    )
    with pytest.raises(IntqError, match=message):
        quantize(path, output, LOWER, Source(), bar=silent)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,name-defined]
        left = [feed[0]]  # noqa: RUF012

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    form = quantization.QuantFormat.QOperator
    quantization.quantize_static(proto, path, Reader(), quant_format=form)
    message = (
        r"QLinearMatMul .*: the model is in QOperator format; expected Q/DQ nodes .*; quantize"
    )
    with pytest.raises(IntqError, match=message):
        quantize(path, output, LOWER, Source(), bar=silent)
    half = onnx.parser.parse_model(
        f"{HEADER} g (float16[2] x) => (float16[2] y) "
        "{ p = QuantizeLinear(x, s) y = DequantizeLinear(p, s) }"
    )
    half.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((), np.float16), "s"))
    onnx.save(half, path)
    with pytest.raises(IntqError, match="is float16; expected a float32 model"):
        quantize(path, output, LOWER, Source(), bar=silent)
    assert not output.exists()
