import functools
import importlib.metadata
import importlib.util
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_intq import engine, engine_device, registry
from onnx_intq.engine import Target, TimingCache, build, choose, parse, version
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
    "wide": f"""{HEADER.replace("17", "21")} <float s = {{1}}, int16 z = {{0}}> {{
        q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }}""",
    "bias": f"""{HEADER} <float s = {{1}}, int32[4] q = {{1, 2, 3, 4}}> {{
        b = DequantizeLinear(q, s) y = Add(x, b) }}""",
    "bits": f"""{HEADER} <uint8[4] s = {{1, 1, 1, 1}}> {{
        u = BitShift<direction = "LEFT">(s, s) c = Cast<to = 1>(u) y = Add(x, c) }}""",
    "product": """<ir_version: 8, opset_import: ["" : 17]>
        g (float[4, 4] x) => (float[4, 4] y) { y = MatMul(x, x) }""",
}
VERSION = importlib.metadata.version("tensorrt_rtx") if find_spec("tensorrt_rtx") else ""
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
@pytest.mark.parametrize(
    ("model", "node", "reason", "advice"),
    [
        ("asymmetric", "QuantizeLinear_0", "ero point is not", "rule zero-point: zero point 3"),
        ("named", "swoosh", "Plugin not found", "rule operator: Swoosh of domain own"),
        ("wide", "", "Failed to import initializer: z", "leave out -a 16"),
        ("bias", "DequantizeLinear_0", "has type Int32", "rule int32-bias"),
        ("bits", "BitShift_0", "operator BitShift is not supported", "rule operator"),
    ],
)
def test_what_the_parser_refuses_is_told_in_our_terms(
    folder: Path, model: str, node: str, reason: str, advice: str
) -> None:
    file = folder / f"{model}.onnx"
    (refusal,) = parse(file).refusals
    assert refusal.node == node
    assert reason in refusal.reason
    assert refusal.advice.startswith(advice)
    assert "\n" not in str(refusal)
    message = f"{file}: tensorrt-rtx {VERSION} cannot parse {refusal}"
    with pytest.raises(IntqError, match=f"^{re.escape(message)}$"):
        build(file)


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize(
    ("model", "capability", "message"),
    [
        ("constant", "8.6", r"node 'Cast_0' \(Cast\): .*\(z\) .*; rule integer-constant: "),
        ("product", "7.5", r"node 'MatMul_0' \(MatMul\): .* GEMM .*; build for 8\.0 or newer"),
    ],
)
def test_what_cannot_be_built_is_told_in_our_terms(
    folder: Path, model: str, capability: str, message: str
) -> None:
    with pytest.raises(IntqError, match=f"cannot build it: {message}") as caught:
        build(folder / f"{model}.onnx", compute_capability=capability)
    assert "\n" not in str(caught.value)


def request(folder: Path, model: str = "qdq.onnx", **changes: Any) -> dict[str, Any]:
    shapes = {"audio": [[1, 16, 8], [1, 16, 16], [2, 16, 32]]}
    return {
        "action": "build",
        "model": str(folder / model),
        "backend": "tensorrt-rtx",
        "compute_capability": "8.6",
        "shapes": shapes,
        "workspace": 512,
        "timing_cache": False,
        "pinned": False,
        **changes,
    }


@needs_library
@pytest.mark.parametrize("action", ["describe", "parse", "build"])
def test_the_childs_work(folder: Path, tmp_path: Path, action: str) -> None:
    answer = engine.answer(request(folder, action=action), tmp_path)
    assert json.loads(json.dumps(answer)).keys() == answer.keys()
    assert answer["version"] == VERSION
    assert (tmp_path / "engine").is_file() == (action == "build")
    if action == "build":
        assert answer["seconds"] > 0
        assert answer["text"].startswith("Layers:")


@needs_library
@pytest.mark.parametrize("capability", ["9.0", "any"])
def test_gpu_kinds_it_does_not_build_for_are_refused(
    folder: Path, tmp_path: Path, capability: str
) -> None:
    message = rf"compute capability '{capability}'; .* builds for 7\.5, "
    with pytest.raises(IntqError, match=message):
        engine.answer(request(folder, compute_capability=capability), tmp_path)
    assert not list(tmp_path.iterdir())


@needs_library
def test_the_version_is_told() -> None:
    assert version("tensorrt-rtx") == VERSION


def test_a_missing_library_names_the_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(IntqError, match=r"; run: pip install 'onnx_intq\[rtx\]'$"):
        engine.answer(request(folder), tmp_path)


def test_files_backends_and_shapes_are_checked_before_a_child_starts(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(IntqError, match="no such file"):
        build(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(IntqError, match="not an ONNX model"):
        parse(tmp_path / "text.onnx")
    with pytest.raises(IntqError, match="'tpu'; expected one of: tensorrt, tensorrt-rtx"):
        build(tmp_path / "none.onnx", backend="tpu")
    with pytest.raises(IntqError, match=r"shapes given for 'video'; .* one of: audio"):
        build(folder / "qdq.onnx", shapes={"video": ((1,), (1,), (1,))})
    with pytest.raises(IntqError, match="of input 'audio' do not fit"):
        build(folder / "qdq.onnx", shapes={"audio": ((1,), (1,), (1,))})


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
    for ask in (parse, build):
        with pytest.raises(IntqError, match=message) as caught:
            ask(folder / "qdq.onnx", timeout=timeout)
        assert "\n" not in str(caught.value)


def test_a_library_that_crashes_has_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(IntqError, match=r"tensorrt-rtx crashed \(SIGABRT\); expected its version"):
        version("tensorrt-rtx")


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands for tensorrt, on a GPU that there is not."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fakes"))
    from fake_gpu import pretend

    module: ModuleType = pretend(monkeypatch)
    return module


def test_tensorrt_builds_in_a_child_where_there_is_a_gpu(trt: ModuleType, tmp_path: Path) -> None:
    import engines

    assert choose() == Target(backend="tensorrt", compute_capability="7.5", gpu="NVIDIA Fake T4")
    file = tmp_path / "m.onnx"
    onnx.save(engines.speech_model(), file)
    tensorrt = functools.partial(build, backend="tensorrt", compute_capability="7.5")
    first = tensorrt(file, timing_cache=TimingCache())
    assert (first.library, first.version) == ("tensorrt", "10.16.1")
    assert [p.precision for p in first.products] == ["int8", "int8", "float"]
    assert (first.count("conv"), first.count("conv", "int8")) == (3, 2)
    assert first.alone == ("dq", "inner_q", "inner_dq")
    assert first.shapes["audio_signal"] == ((1, 4, 200), (1, 4, 1000), (8, 4, 2000))
    again = TimingCache(known=first.timing_cache, pinned=True)
    assert tensorrt(file, timing_cache=again).engine == first.engine
    onnx.save(engines.one_node("[crash] y = Crash(x)"), file)
    with pytest.raises(IntqError, match="invalid ONNX"):
        tensorrt(file)
    onnx.save(engines.one_node("[odd] y = own.Odd(x)"), file)
    with pytest.raises(IntqError, match=r"cannot parse node 'odd' \(Odd\): no importer for Odd"):
        tensorrt(file)
    onnx.save(engines.one_node("[det] y = Abs(x)"), file)
    assert tensorrt(file).timing_cache == b""


def test_a_gpu_kind_that_is_not_at_hand_is_refused(trt: ModuleType) -> None:
    assert choose("tensorrt", "7.5").gpu == "NVIDIA Fake T4"
    with pytest.raises(IntqError, match=r"builds for the GPU at hand, NVIDIA Fake T4 \(7\.5\);"):
        choose("tensorrt", "8.6")
    assert choose("tensorrt-rtx") == Target(backend="tensorrt-rtx", compute_capability="7.5")
    assert choose("tensorrt-rtx", "8.9").compute_capability == "8.9"


def test_without_tensorrt_or_a_gpu_tensorrt_rtx_builds(
    trt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_device, "gpu", lambda: None)
    assert choose("tensorrt-rtx") == Target(backend="tensorrt-rtx", compute_capability="8.6")
    note = "no GPU here: built with tensorrt-rtx, another product"
    assert choose() == Target(backend="tensorrt-rtx", compute_capability="8.6", note=note)
    with pytest.raises(IntqError, match=r"^building with tensorrt, which .* needs an NVIDIA GPU"):
        choose("tensorrt")
    without(monkeypatch, "tensorrt")
    assert choose(None, "7.5").note.startswith("no GPU and no tensorrt here")
    with pytest.raises(IntqError, match=r"; run: pip install 'onnx_intq\[tensorrt\]'$"):
        choose("tensorrt")
    with pytest.raises(IntqError, match="unknown backend 'tpu'"):
        choose("tpu")


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """As if `module` were not installed."""
    found = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else found(name)
    )


@pytest.mark.slow
@needs_library
def test_every_convolution_of_quartznet_runs_in_int8(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_named(str(assets / "quartznet15x5.nemo"), tmp_path / "float.onnx")
    model = quantize(tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    parsed = parse(model, compute_capability="7.5")
    assert parsed.refusals == ()
    found = build(model, compute_capability="8.6")
    assert found.count("conv", "int8") == found.count("conv") == 171
    # The float model takes 76 MB; int8 weights take a quarter.
    assert len(found.engine) < 32_000_000
    with capsys.disabled():
        sys.stdout.write(
            f"\nquartznet15x5 W8A8, {found.library} {found.version}: {found.seconds:.1f} s, "
            f"{len(found.engine) / 1e6:.2f} MB for SM86, 171 of 171 convolutions int8, "
            f"{len(found.alone)} Q/DQ alone; parsed for SM75: {parsed.layers} layers\n"
        )
