"""Nonlinear functions as int32 islands between Q/DQ pairs: the integer target's very integers."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq import engine, qdq
from onnx_intq.calibrate import calibrate
from onnx_intq.check import check, warn
from onnx_intq.graph import graph_from_model, load, metadata, model_from_graph, save
from onnx_intq.models.export import export_named
from onnx_intq.recipes import PREPARE, pipeline
from onnx_intq.registry import parse, render
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, IntqError, run
from onnx_intq.verify import well_formed

needs_library = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install 'onnx_intq[rtx]'"
)
law = settings(max_examples=40, deadline=None)
MODES = ("poly", "paper", "lut")
ELEMENTWISE = [
    *(f"c = {op}(a)" for op in ("Sigmoid", "Tanh", "Erf", "Gelu", "Exp", "HardSwish", "Softplus")),
    "s = Sigmoid(a) c = Mul(a, s)",
]
PLACES = {
    "nonlinear": ELEMENTWISE,
    "softmax": ["c = Softmax<axis = -1>(a)", "c = LogSoftmax<axis = 1>(a)"],
    "layer_norm": ["c = LayerNormalization<axis = -1>(a, gamma, beta)"],
}
BODIES = [(family, body) for family, bodies in PLACES.items() for body in bodies]
SCALES = st.floats(0.002, 0.4).map(lambda s: float(np.float32(s)))


def lowered(place: Any, family: str, body: str, y: Any, x: Any, spec: str) -> gs.Graph | list[str]:
    """The lowered place, or why it stays float."""
    vectors = {n: np.linspace(0.5, 2, 6, dtype=np.float32) for n in ("gamma", "beta")}
    model: gs.Graph = place.graph(body, y, x, **vectors)
    (lowering,) = parse(f"integerize_{family}({spec})")
    why: list[str] = place.lower(lowering, model)
    return why or model


def require_islands(model: gs.Graph) -> None:
    """Nothing but what TensorRT computes with; what is cast to int8 fits without wrapping."""
    constants = [t for t in model.tensors().values() if isinstance(t, gs.Constant)]
    assert {t.dtype.name for t in constants} <= {"int32", "int64", "float32"}
    types = {t.dtype.name for node in model.nodes for t in node.outputs}
    assert types <= {"int8", "int32", "int64", "bool"}
    assert check(model, "tensorrt") == []


@law
@given(st.sampled_from(BODIES), SCALES, SCALES, st.sampled_from(MODES))
def test_an_island_gives_the_integers_of_the_integer_target(
    place: Any, place_of: tuple[str, str], x_scale: float, y_scale: float, mode: str
) -> None:
    family, body = place_of
    x, y = ("int8", x_scale, 0), ("int8", y_scale, 0)
    reference = lowered(place, family, body, y, x, f"mode={mode!r}")
    island = lowered(place, family, body, y, x, f"mode={mode!r}, target='tensorrt'")
    if isinstance(reference, list):
        assert island == reference
        return
    assert isinstance(island, gs.Graph)
    q = place.integers("int8", (600, 6))
    np.testing.assert_array_equal(place.outputs(island, q), place.outputs(reference, q))
    require_islands(island)


@law
@given(SCALES, SCALES, SCALES, st.sampled_from(MODES))
def test_a_gated_product_is_the_kernel(
    place: Any, a_scale: float, b_scale: float, y_scale: float, mode: Any
) -> None:
    from onnx_intq.kernels.sigmoid import glu

    a, b, y = (("int8", scale, 0) for scale in (a_scale, b_scale, y_scale))
    model = place.graph("s = Sigmoid(b) c = Mul(s, a)", y, a, b, shapes=("n, 6", "n, 6"))
    (lowering,) = parse(f"integerize_nonlinear(mode={mode!r}, target='tensorrt')")
    assert place.lower(lowering, model) == []
    require_islands(model)
    left, right = place.integers("int8", (600, 6)), place.integers("int8", (600, 6))[::-1]
    reals = left.astype(np.int64), a_scale, right.astype(np.int64), b_scale
    expected = place.requantized(*glu(*reals, mode), y)
    np.testing.assert_array_equal(place.outputs(model, left, right), expected)


def cast_inputs(model: gs.Graph, feeds: Any) -> list[Any]:
    """The values of every tensor that is cast to int8."""
    int8 = onnx.TensorProto.INT8
    casts = [n for n in model.nodes if n.op == "Cast" and n.attrs["to"] == int8]
    own, model.outputs = model.outputs, [n.inputs[0] for n in casts]
    found = Session(model_from_graph(model), threads=1).run(feeds)
    model.outputs = own
    return list(found.values())


@pytest.mark.parametrize("body", ELEMENTWISE)
@pytest.mark.parametrize("mode", MODES)
def test_no_cast_is_relied_upon_to_wrap(place: Any, body: str, mode: str) -> None:
    """Whether TensorRT's Cast wraps or saturates is not documented."""
    x, y = ("int8", 0.05, 0), ("int8", 0.004, 0)
    model = lowered(place, "nonlinear", body, y, x, f"mode={mode!r}, target='tensorrt'")
    assert isinstance(model, gs.Graph)
    (values,) = cast_inputs(model, {"x0": place.integers("int8", (600, 6))})
    assert (values.min() >= -128, values.max() <= 127) == (True, True)


def test_what_has_no_kernel_at_its_scale_stays_float(place: Any) -> None:
    model = place.graph("c = Sigmoid(a)", ("int8", 0.01, 0), ("int8", 2.0, 0))
    passes = parse("integerize_nonlinear(mode='paper', target='tensorrt')")
    ctx = Context(facts={"complete"})
    run(model, passes, ctx, [well_formed])
    ((_, why),) = ctx.skipped
    assert why.startswith("an exponential of steps of 2; expected at most ln 2")
    assert ctx.remaining == []


WIDTH = 32
BLOCK = f"""<ir_version: 8, opset_import: ["" : 17]> conformer (float[1, t, {WIDTH}] x)
    => (float[1, t, {WIDTH}] y) {{
        n1 = LayerNormalization(x, g, b) f0 = MatMul(n1, w1) f1 = Add(f0, c1)
        e0 = Div(f1, sqrt2) e1 = Erf(e0) e2 = Add(e1, one) e3 = Mul(f1, e2) gelu = Mul(e3, half)
        f2 = MatMul(gelu, w2) h1 = Add(x, f2)

        n2 = LayerNormalization(h1, g, b) q = MatMul(n2, wq) k0 = MatMul(n2, wk)
        k = Transpose<perm = [0, 2, 1]>(k0) v = MatMul(n2, wv) s0 = MatMul(q, k) s1 = Div(s0, root)
        [attention] weights = Softmax(s1) a = MatMul(weights, v) a1 = MatMul(a, wo) h2 = Add(h1, a1)

        n3 = LayerNormalization(h2, g, b) t0 = Transpose<perm = [0, 2, 1]>(n3)
        u = Conv(t0, wu, cu) left, right = Split<axis = 1>(u) gate = Sigmoid(right)
        [glu] glu = Mul(left, gate) z = Conv<pads = [2, 2], group = {WIDTH}>(glu, wz, b)
        sz = Sigmoid(z) swish = Mul(z, sz) o = Conv(swish, wp, b)
        t1 = Transpose<perm = [0, 2, 1]>(o) h3 = Add(h2, t1)
        n4 = LayerNormalization(h3, g, b) l = MatMul(n4, wl) y = LogSoftmax(l)
    }}"""
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"w{name}": (WIDTH, WIDTH) for name in "qkvol"},
    "w1": (WIDTH, 4 * WIDTH),
    "w2": (4 * WIDTH, WIDTH),
    "wu": (2 * WIDTH, WIDTH, 1),
    "wz": (WIDTH, 1, 5),
    "wp": (WIDTH, WIDTH, 1),
    "c1": (4 * WIDTH,),
    "cu": (2 * WIDTH,),
    "b": (WIDTH,),
}
SCALARS = {"sqrt2": np.sqrt(2), "one": 1, "half": 0.5, "root": np.sqrt(WIDTH)}
ROWS = (
    "fold_bn, fuse_nonlinear, insert_qdq(target='tensorrt'), insert_islands(rows=True), "
    "quantize_weights, integerize_nonlinear(target='tensorrt'), "
    "integerize_softmax(target='tensorrt'), integerize_layer_norm(target='tensorrt')"
)


def conformer() -> gs.Graph:
    """One block with random weights that keep the size of what they multiply."""
    model, random = onnx.parser.parse_model(BLOCK), np.random.default_rng(0)
    values: dict[str, Any] = {name: np.float32(value) for name, value in SCALARS.items()}
    values["g"] = np.ones(WIDTH, np.float32)
    for name, shape in SHAPES.items():
        fan_in = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
        spread = 0.3 if name[0] in "bc" else fan_in**-0.5 * (3 if name in {"wq", "wl"} else 1)
        values[name] = random.normal(0, spread, shape).astype(np.float32)
    for name, value in values.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return graph_from_model(model)


def feeds(seed: int) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(seed)
    for length in (40, 66, 91):
        yield {"x": random.normal(0, 1, (1, length, WIDTH)).astype(np.float32)}


def quantized(nonlinear: str) -> tuple[gs.Graph, dict[str, int], Context]:
    """The block for TensorRT, changes by pass, and what was left alone."""
    model, ctx = conformer(), Context()
    passes = parse(ROWS) if nonlinear == "rows" else pipeline("tensorrt", nonlinear=nonlinear)
    split = next(i for i, spec in enumerate(passes) if "calibrated" in spec.needs)
    run(model, passes[:split], ctx, [well_formed])
    ctx.ranges = calibrate(model, feeds(0), threads=1).select("minmax", symmetric=True)
    ctx.facts.add("calibrated")
    reports = run(model, passes[split:], ctx, [well_formed])
    return model, {report.spec.name: report.changes for report in reports}, ctx


def sqnr(model: gs.Graph) -> float:
    """Decibels, of the outputs against the float model's."""
    sessions = [Session(model_from_graph(g), threads=1) for g in (conformer(), model)]
    pairs = [[session.run(batch)["y"] for session in sessions] for batch in feeds(1)]
    noise = sum(np.square(a - b).sum() for a, b in pairs)
    return float(10 * np.log10(sum(np.square(a).sum() for a, _ in pairs) / noise))


@pytest.mark.parametrize(
    ("nonlinear", "lost"), [("poly", 1.0), ("lut", 1.0), ("paper", 2.0), ("rows", 3.0)]
)
def test_islands_lose_little_beside_float_functions(nonlinear: str, lost: float) -> None:
    """`lost`: decibels. Measured: float 39.1, poly 38.5, lut 38.5, paper 37.6, rows 37.2."""
    model, changes, ctx = quantized(nonlinear)
    rows = nonlinear == "rows"
    assert changes["insert_islands"] == (7 if rows else 3)
    assert changes["integerize_nonlinear"] == 3
    assert ctx.remaining == []
    assert check(model, "tensorrt") == []
    assert rows or warn(model, "tensorrt") == []  # residual sums have pairs for LayerNormalization
    left = {name for name, _ in ctx.skipped}
    assert ("attention" in left) == (not rows)
    if not rows:
        assert {"Sigmoid", "Erf", "Gelu"}.isdisjoint(node.op for node in model.nodes)
    reference, _, _ = quantized("float")
    assert sqnr(model) > sqnr(reference) - lost
    assert sqnr(model) > 25


def test_islands_stand_between_pairs() -> None:
    model, _, _ = quantized("poly")
    int8 = onnx.TensorProto.INT8
    ends = [n for n in model.nodes if n.op == "Cast" and n.attrs["to"] == int8]
    assert [[r.op for r in n.outputs[0].outputs] for n in ends] == [["DequantizeLinear"]] * 3
    starts = [n for n in model.nodes if n.inputs[0].dtype == np.int8 and n.op not in qdq.QDQ]
    assert {(n.op, n.inputs[0].inputs[0].op) for n in starts} == {("Cast", "QuantizeLinear")}
    assert {q.outputs[0].dtype.name for n in starts for q in n.inputs[0].inputs} == {"int8"}
    batch = next(feeds(2))
    assert all(v.min() >= -128 and v.max() <= 127 for v in cast_inputs(model, batch))


@needs_library
@pytest.mark.parametrize("nonlinear", ["float", *MODES, "rows"])
def test_nvidias_parser_takes_islands(nonlinear: str, tmp_path: Path) -> None:
    save(quantized(nonlinear)[0], tmp_path / "m.onnx")
    assert engine.parse(tmp_path / "m.onnx", compute_capability="7.5").refusals == ()


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("nonlinear", ["float", *MODES, "rows"])
def test_engines_of_islands_are_built(nonlinear: str, tmp_path: Path) -> None:
    save(quantized(nonlinear)[0], tmp_path / "m.onnx")
    built = engine.build(tmp_path / "m.onnx", compute_capability="8.6")
    assert built.count("matmul", "int8") == built.count("matmul") == 9
    assert built.count("conv", "int8") == built.count("conv") == 3
    assert built.alone == ()  # no pair but at the boundary stands alone
    if nonlinear != "rows":  # each island is part of one kernel
        read = {dtype for layer in built.layers for dtype in (*layer.inputs, *layer.outputs)}
        assert read <= {"float", "int8"}


def test_a_model_without_nonlinear_functions_stays_as_it_is(tiny: Path) -> None:
    """All but the final LogSoftmax, which stays float, as outputs do."""
    models, recipes = [], []
    for nonlinear in ("poly", "float"):
        model, passes = load(tiny), pipeline("tensorrt", nonlinear=nonlinear)
        ctx = Context(facts={"calibrated"}, ranges=dict.fromkeys(model.tensors(), (-4.0, 4.0)))
        run(model, passes, ctx, [well_formed])
        assert ctx.skipped == []
        models.append(model_from_graph(model).SerializeToString(deterministic=True))
        recipes.append(render(passes))
    assert models[0] == models[1]
    islands, floats = recipes
    weights = "quantize_tables, quantize_weights(recurrent=True)"
    assert floats == f"{PREPARE}, insert_qdq(target='tensorrt'), {weights}"
    assert islands == (
        f"{PREPARE}, fuse_nonlinear, insert_qdq(target='tensorrt'), insert_islands, "
        f"{weights}, integerize_nonlinear(target='tensorrt')"
    )


def test_the_integer_target_has_no_float_functions() -> None:
    with pytest.raises(IntqError, match=r"in float for target integer; expected poly, .*; leave"):
        pipeline("integer", nonlinear="float")
    assert pipeline("ort") == pipeline("ort", nonlinear="float")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with m.onnx, the block, and d.npz, feeds for it; the current one."""
    monkeypatch.chdir(tmp_path)
    save(conformer(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **{f"{i:04}/x": f["x"] for i, f in enumerate(feeds(0))})
    return tmp_path


QUANTIZE = "quantize m.onnx -o o.onnx --data d.npz --json"


@pytest.mark.parametrize(
    ("options", "islands"),
    [("", 3), ("--nonlinear lut", 3), ("--override glu=float", 2), ("--nonlinear float", None)],
)
def test_quantize_makes_islands(there: Path, command: Any, options: str, islands: Any) -> None:
    code, out, err = command(*f"{QUANTIZE} --target tensorrt {options}".split())
    assert (code, err) == (0, err)
    changes = {p["pass"].partition("(")[0]: p["changes"] for p in json.loads(out)["passes"]}
    assert changes.get("insert_islands") == changes.get("integerize_nonlinear") == islands
    said = [why for name, why in json.loads(out)["left"] if name == "glu"]
    assert said == (["kept float by request"] if "glu=float" in options else [])
    assert command("check", "o.onnx", "--target", "tensorrt")[0] == 0
    recipe = metadata(load(there / "o.onnx"))["onnx_intq.recipe"]
    again = ("--data", "d.npz", "--recipe", recipe)
    assert command("quantize", "m.onnx", "-o", "2.onnx", *again)[0] == 0
    assert (there / "o.onnx").read_bytes() == (there / "2.onnx").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--target integer --nonlinear float", "nonlinear functions left in float for target int"),
        ("--nonlinear float", "--nonlinear has no effect without --target integer or tensorrt;"),
        ("--target tensorrt --nonlinear float --override glu=float", "no node matches 'glu'"),
        ("--target tensorrt --io int8", "--io has no effect without --target integer;"),
    ],
)
def test_what_has_no_meaning_is_refused(
    there: Path, command: Any, options: str, message: str
) -> None:
    code, out, err = command(*f"{QUANTIZE} {options}".split())
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not (there / "o.onnx").exists()


@pytest.mark.parametrize("family", PLACES)
def test_targets_are_checked(place: Any, family: str) -> None:
    model = place.graph(PLACES[family][0], ("int8", 0.1, 0), ("int8", 0.1, 0))
    passes = parse(f"integerize_{family}(target='ort')")
    with pytest.raises(IntqError, match="target 'ort'; expected one of: integer, tensorrt"):
        run(model, passes, Context(facts={"complete"}))


@pytest.mark.slow
def test_quartznet_has_no_islands(assets: Path, tmp_path: Path) -> None:
    export_named(str(assets / "quartznet15x5.nemo"), tmp_path / "float.onnx")
    files = []
    for nonlinear in ("poly", "float"):
        model = load(tmp_path / "float.onnx")
        ctx = Context(facts={"calibrated"}, ranges=dict.fromkeys(model.tensors(), (-4.0, 4.0)))
        run(model, pipeline("tensorrt", nonlinear=nonlinear), ctx)
        assert ctx.skipped == []
        save(model, tmp_path / f"{nonlinear}.onnx")
        files.append((tmp_path / f"{nonlinear}.onnx").read_bytes())
    assert files[0] == files[1]
