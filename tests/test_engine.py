import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_intq import engine, registry
from onnx_intq.engine import build, parse
from onnx_intq.graph import graph_from_model, load, save
from onnx_intq.models.export import export_named
from onnx_intq.transform import Context, IntqError, run

CONVOLUTIONS = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[b, 16, t] audio) => (float[b, 16, u] y)
    <float[16] gamma = {GAMMA}, float[16] zero = {ZERO}, float[16] one = {ONE}> {
        a = Conv<group: int = 16, pads = [1, 1]>(audio, depthwise)
        n = BatchNormalization(a, gamma, zero, zero, one)
        r = Relu(n)
        c = Conv(r, pointwise)
        y = Add(c, audio)
    }"""
RECIPE = "fold_bn, insert_qdq(target='tensorrt'), quantize_weights(scale='minmax')"
HEADER = '<ir_version: 8, opset_import: ["" : 17, "own" : 1]> g (float[4] x) => (float[4] y)'
REFUSED = {
    "asymmetric": f"""{HEADER} <float s = {{1}}, int8 z = {{3}}> {{
        q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }}""",
    "named": f"{HEADER} {{ [swoosh] y = own.Swoosh(x) }}",
    "constant": f"{HEADER} <int8 z = {{3}}> {{ c = Cast<to = 1>(z) y = Mul(x, c) }}",
}
needs_library = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install 'onnx_intq[rtx]'"
)


def convolutions() -> onnx.ModelProto:
    values = {"GAMMA": "2", "ZERO": "0", "ONE": "1"}
    text = CONVOLUTIONS
    for name, value in values.items():
        text = text.replace(name, ", ".join([value] * 16))
    model = onnx.parser.parse_model(text)
    for name, shape in (("depthwise", (16, 1, 3)), ("pointwise", (16, 16, 1))):
        w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(w, name))
    return model


def quantize(source: Path, target: Path) -> Path:
    graph = load(source)
    context = Context(facts={"calibrated"}, ranges=dict.fromkeys(graph.tensors(), (-4, 4)))
    run(graph, registry.parse(RECIPE), context)
    save(graph, target)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds two convolutions with a residual sum, float and quantized, and the refused models."""
    path = tmp_path_factory.mktemp("engine")
    save(graph_from_model(convolutions()), path / "float.onnx")
    quantize(path / "float.onnx", path / "qdq.onnx")
    for name, text in REFUSED.items():
        onnx.save(onnx.parser.parse_model(text), path / f"{name}.onnx")
    return path


@pytest.mark.slow
@needs_library
def test_convolutions_of_a_qdq_model_run_in_int8(folder: Path) -> None:
    found = build(folder / "qdq.onnx")
    assert (found.library, found.compute_capability) == ("tensorrt-rtx", "8.6")
    assert found.version[0].isdigit()
    assert len(found.engine) > 1000
    assert found.seconds > 0
    assert found.count("conv", "int8") == found.count("conv") == len(found.products) == 2
    assert str(len(found.engine)) not in repr(found)
    kinds = [layer.kind for layer in found.layers]
    assert kinds.count("correlation") == 2


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize(("model", "capability"), [("float.onnx", "8.6"), ("qdq.onnx", "7.5")])
def test_others_run_in_float(folder: Path, model: str, capability: str) -> None:
    found = build(folder / model, compute_capability=capability)
    assert found.count("conv", "float") == found.count("conv") == 2
    assert found.count("matmul") == 0


@needs_library
def test_a_model_is_parsed_without_building(folder: Path) -> None:
    found = parse(folder / "qdq.onnx")
    assert found.refusals == ()
    assert found.layers > 7
    assert found.library == "tensorrt-rtx"


@pytest.mark.slow
@needs_library
def test_what_the_parser_refuses_is_told(folder: Path) -> None:
    ((node, why),) = parse(folder / "asymmetric.onnx").refusals
    assert node == "QuantizeLinear number 0"
    assert "ero point" in why
    assert "\n" not in why
    message = f"^{folder}/asymmetric.onnx: .* cannot parse node 'QuantizeLinear number 0': "
    with pytest.raises(IntqError, match=message):
        build(folder / "asymmetric.onnx")


def request(folder: Path, model: str = "qdq.onnx", **changes: Any) -> dict[str, Any]:
    shapes = {"audio": [[1, 16, 8], [1, 16, 16], [2, 16, 32]]}
    found = {"action": "build", "model": str(folder / model), "backend": "tensorrt-rtx"}
    return {**found, "compute_capability": "8.6", "shapes": shapes, **changes}


@needs_library
@pytest.mark.parametrize("action", ["parse", "build"])
def test_the_childs_work(folder: Path, tmp_path: Path, action: str) -> None:
    answer = engine.answer(request(folder, action=action), tmp_path)
    assert json.loads(json.dumps(answer)).keys() == answer.keys()
    assert (tmp_path / "engine").is_file() == (action == "build")
    if action == "build":
        assert answer["seconds"] > 0
        assert answer["layers"].startswith("Layers:")


@needs_library
@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("qdq.onnx", {"shapes": {"video": []}}, "shapes given for 'video'; .* one of: audio"),
        ("qdq.onnx", {"shapes": {"audio": [[1]] * 3}}, "of input 'audio' do not fit"),
        ("qdq.onnx", {"compute_capability": "9.0"}, r"capability '9\.0'; .* builds for 7\.5, "),
        ("qdq.onnx", {"compute_capability": "any"}, "compute capability 'any'"),
        ("asymmetric.onnx", {}, "cannot parse node 'QuantizeLinear number 0': .*ero point"),
        ("named.onnx", {}, "cannot parse node 'swoosh': "),
        ("constant.onnx", {"shapes": {}}, r"cannot build it: .*Quantized constant \(z\)"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(
    folder: Path, tmp_path: Path, model: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(IntqError, match=message) as caught:
        engine.answer(request(folder, model, **changes), tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_names_the_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(IntqError, match=r"; run: pip install 'onnx_intq\[rtx\]'$"):
        engine.answer(request(folder), tmp_path)


def test_files_and_backends_are_checked_before_a_child_starts(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match="no such file"):
        build(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(IntqError, match="not an ONNX model"):
        parse(tmp_path / "text.onnx")
    with pytest.raises(IntqError, match="backend 'tpu'; expected one of: tensorrt-rtx"):
        build(tmp_path / "none.onnx", backend="tpu")


@pytest.mark.parametrize(
    ("module", "timeout", "message"),
    [
        ("raise ImportError('gone')", 60, r"gone.*; run: pip install 'onnx_intq\[rtx\]'$"),
        ("import os; os.abort()", 60, r"tensorrt-rtx crashed \(SIGABRT\); expected .*; look for"),
        ("import time; time.sleep(60)", 0.5, r"did not end within 0\.5 s"),
    ],
    ids=["missing", "crash", "hang"],
)
def test_a_library_that_fails_ends_in_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    timeout: float,
    message: str,
) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(IntqError, match=message) as caught:
        parse(folder / "qdq.onnx", timeout=timeout)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@needs_library
def test_every_convolution_of_quartznet_runs_in_int8(assets: Path, tmp_path: Path) -> None:
    export_named(str(assets / "quartznet15x5.nemo"), tmp_path / "float.onnx")
    model = quantize(tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    assert parse(model, compute_capability="7.5").refusals == ()
    found = build(model, compute_capability="8.6")
    assert found.count("conv", "int8") == found.count("conv") == 171
    # The float model takes 76 MB; int8 weights take a quarter.
    assert len(found.engine) < 32_000_000
