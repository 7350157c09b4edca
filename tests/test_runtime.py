import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_intq import runtime
from onnx_intq.feeds import TensorSpec
from onnx_intq.runtime import Model, Session, latency, optimized_ops, saturates
from onnx_intq.transform import IntqError

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
SCALE = f"""{HEADER} scale (float[n, ?, 3] x, int64[2] shape) => (float[n, ?, 3] y, float[] z)
    <float[3] w = {{1, 2, 3}}> {{
        y = Mul(x, w)
        z = Reshape(x, shape)
    }}"""
QDQ = f"""{HEADER} qdq (float[1, 2, t] x) => (float[1, 2, t] y)
    <float s = {{0.5}}, uint8 z = {{128}}, int8[2, 2, 1] w = {{1, 2, 3, 4}}, float v = {{0.25}},
     int8 o = {{0}}> {{
        a = QuantizeLinear(x, s, z)
        b = DequantizeLinear(a, s, z)
        c = DequantizeLinear(w, v, o)
        d = Conv(b, c)
        e = QuantizeLinear(d, s, z)
        y = DequantizeLinear(e, s, z)
    }}"""
BRANCH = f"""{HEADER} branch (bool c, float[2] x) => (float[2] y) {{
        y = If(c) <
            then_branch = t () => (float[2] p) {{ p = Sin(x) }},
            else_branch = e () => (float[2] q) {{ q = Cos(x) }}>
    }}"""


def model(text: str = SCALE) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.ones((2, 1, 3), np.float32), "shape": np.array([3, 2])}


def test_inputs_outputs_and_metadata_are_told() -> None:
    proto = model()
    onnx.helper.set_model_props(proto, {"onnx_intq.seed": "1"})
    session = Session(proto)
    x = TensorSpec(name="x", dtype=np.dtype(np.float32), shape=("n", None, 3))
    assert session.inputs[0] == x
    assert session.inputs[1] == TensorSpec(name="shape", dtype=np.dtype(np.int64), shape=(2,))
    assert [output.name for output in session.outputs] == ["y", "z"]
    assert session.metadata == {"onnx_intq.seed": "1"}


@pytest.mark.parametrize("optimize", [True, False])
def test_a_model_runs_from_file_bytes_and_memory(tmp_path: Path, optimize: bool) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model(), path)
    sources: list[Model] = [path, str(path), path.read_bytes(), model()]
    for source in sources:
        found = Session(source, threads=1, optimize=optimize).run(feeds())
        assert list(found) == ["y", "z"]
        np.testing.assert_array_equal(found["y"], [[[1, 2, 3]]] * 2)
        assert found["z"].shape == (3, 2)


def test_outputs_can_be_chosen() -> None:
    session = Session(model())
    assert list(session.run(feeds(), ["z"])) == ["z"]
    assert session.run(feeds(), []) == {}
    with pytest.raises(IntqError, match="model: no output 'w'; expected one of: y, z"):
        session.run(feeds(), ["y", "w"])


def test_feeds_are_checked_before_running() -> None:
    with pytest.raises(IntqError, match="feeds lack input 'shape'; expected x "):
        Session(model()).run({"x": feeds()["x"]})


def test_failures_while_running_are_one_line() -> None:
    with pytest.raises(IntqError, match=r"model: onnxruntime cannot run it: .*Reshape") as caught:
        Session(model()).run(feeds() | {"shape": np.array([5, 2])})
    assert "\n" not in str(caught.value)
    assert "[ONNXRuntimeError]" not in str(caught.value)


def test_models_that_cannot_be_loaded_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(IntqError, match=r"m\.onnx: no such file; expected an ONNX model"):
        Session(path)
    path.write_text("no model")
    with pytest.raises(IntqError, match=r"m\.onnx: onnxruntime cannot load it: ") as caught:
        Session(path)
    assert "\n" not in str(caught.value)
    unknown = f"{HEADER} g (float[1] x) => (float[1] y) {{ y = Unknown(x) }}"
    with pytest.raises(IntqError, match=r"model: onnxruntime cannot load it: .*Unknown"):
        Session(model(unknown))
    with pytest.raises(IntqError, match="0 threads; expected at least 1"):
        Session(model(), threads=0)


def test_sequences_are_refused() -> None:
    text = f"{HEADER} g (float[2] x) => (seq(float[1]) y) {{ y = SplitToSequence(x) }}"
    with pytest.raises(IntqError, match=r"'y' has type seq\(tensor\(float\)\)"):
        Session(model(text))


def test_a_missing_onnxruntime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(IntqError, match=r"run: pip install 'onnx_intq\[cpu\]'"):
        Session(model())


def test_models_above_the_limit_go_through_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = model(f"{HEADER} g (float[n, 1000] x) => (float[n, 1] y) {{ y = MatMul(x, w) }}")
    weights = np.arange(1000, dtype=np.float32).reshape(1000, 1)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    before = proto.SerializeToString(deterministic=True)
    monkeypatch.setattr(runtime, "PROTOBUF_LIMIT", 100)
    (y,) = Session(proto).run({"x": np.ones((1, 1000), np.float32)}).values()
    assert y[0, 0] == weights.sum()
    assert proto.SerializeToString(deterministic=True) == before


def test_extreme_integer_products_are_exact() -> None:
    text = f"""{HEADER} g (uint8[1, 256, 8] x) => (uint8[1, 16, 8] y)
        <float s = {{1}}, uint8 z = {{0}}, int8 o = {{0}}, float u = {{65536}}, uint8 p = {{128}}>
        {{ y = QLinearConv(x, s, z, w, s, o, u, p) }}"""
    proto, random = model(text), np.random.default_rng(0)
    w = random.choice(np.array([-128, 127], np.int8), (16, 256, 1))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    x = random.choice(np.array([0, 255], np.uint8), (1, 256, 8))
    (y,) = Session(proto).run({"x": x}).values()
    exact = np.einsum("oi,nit->not", w[:, :, 0].astype(np.int64), x.astype(np.int64))
    np.testing.assert_array_equal(y, np.clip(np.rint(exact / 65536) + 128, 0, 255))


@pytest.mark.parametrize("weak", [True, False])
def test_slow_exact_products_are_chosen_only_where_fast_ones_saturate(
    monkeypatch: pytest.MonkeyPatch, weak: bool
) -> None:
    monkeypatch.setattr(runtime, "saturates", lambda: weak)
    options = Session(model())._session.get_session_options()
    if weak:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError, match="x64quantprecision"):
            options.get_session_config_entry("session.x64quantprecision")


def test_whether_products_saturate_is_found_by_multiplying() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "vnni" in flags:
        assert not saturates()
    assert saturates() is saturates()


def test_optimized_operators_show_what_was_fused() -> None:
    found = optimized_ops(model(QDQ))
    del found["Transpose"]  # onnxruntime may turn the convolution to channels-last
    assert found == Counter(QuantizeLinear=1, QLinearConv=1, DequantizeLinear=1)


def test_optimized_operators_of_bodies_count() -> None:
    assert optimized_ops(model(BRANCH)) == Counter(If=1, Sin=1, Cos=1)


def test_latency_is_taken_in_turn() -> None:
    small = model(f"{HEADER} g (float[n, n] x) => (float[n, n] y) {{ y = Relu(x) }}")
    large = model(f"{HEADER} g (float[n, n] x) => (float[n, n] y) {{ y = MatMul(x, x) }}")
    batch = {"x": np.ones((300, 300), np.float32)}
    first, second = latency([small, large], [batch, batch], rounds=7)
    assert (first.ratio, first.rounds, second.rounds) == (1, 7, 7)
    # 300 times as many operations: more than twice the time on any machine, under any load.
    assert second.ratio > 2
    for timing in (first, second):
        assert 0 < timing.low <= timing.median <= timing.high


def test_latency_goes_on_for_the_time_given() -> None:
    tiny = model(f"{HEADER} g (float[1] x) => (float[1] y) {{ y = Relu(x) }}")
    (timing,) = latency([tiny], [{"x": np.ones(1, np.float32)}], rounds=1, seconds=0.2)
    assert timing.rounds * timing.high > 0.01
    assert timing.rounds > 1
    with pytest.raises(IntqError, match="0 rounds of timing; expected at least 1"):
        latency([tiny], [{"x": np.ones(1, np.float32)}], rounds=0)


PACKED = f"""{HEADER} g (uint8[4, 64] x) => (int32[4, 16] y)
    <uint8 zx = {{0}}, int8 zw = {{0}}, int8[2] table = {{-1, 1}}> {{
        i = Cast<to = 6>(k)
        w = Gather(table, i)
        y = MatMulInteger(x, w, zx, zw)
    }}"""


def test_packed_weights_are_no_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor whose products of the two types saturate, int8 weights are replaced."""
    proto = model(PACKED)
    indices = np.random.default_rng(0).integers(0, 2, (64, 16)).astype(np.uint8)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(indices, "k"))
    monkeypatch.setattr(runtime, "saturates", lambda: True)
    x = np.full((4, 64), 255, np.uint8)
    (y,) = Session(proto).run({"x": x}).values()
    np.testing.assert_array_equal(y, x.astype(np.int32) @ (2 * indices.astype(np.int32) - 1))
