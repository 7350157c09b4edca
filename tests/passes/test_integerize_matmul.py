from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.grid import dyadic, requantize
from onnx_intq.integer_only import prove
from onnx_intq.lowering import GRIDS
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, IntqError, run
from onnx_intq.verify import well_formed

IntegerizeMatmul = load("integerize_matmul")
RANDOM = np.random.default_rng(0)
XS, WS, YS = np.float32(0.02), np.float32(0.01), np.float32(0.05)
TAIL = ["Mul", "Add", "Div", "Clip", "Cast"]
law = settings(max_examples=60, deadline=None)


def graph(
    inputs: str,
    body: str = "c = MatMul(a, b)",
    *,
    y: str = "int8",
    axis: int = -1,
    **constants: Any,
) -> gs.Graph:
    """The node `body` of a and b, the dequantized x and w; its result c is quantized to `y`."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({y} q) {{
            a = DequantizeLinear<axis = {axis}>(x, xs, xz)
            b = DequantizeLinear<axis = {axis}>(w, ws, wz)
            {body}
            q = QuantizeLinear(c, ys, yz)
        }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    constants = {"xs": XS, "ws": WS, "ys": YS, "yz": np.zeros((), y)} | constants
    for name, values in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def lower(model: gs.Graph, cpu: str = "vnni") -> list[str]:
    """Lower; doing so again must change nothing. Returns why something remains."""
    ctx = Context(facts={"complete"})
    spec = parse(f"integerize_matmul(cpu={cpu!r})")[0]
    first, second = run(model, [spec, spec], ctx, [well_formed])
    assert second.changes == 0
    assert second.skipped == first.skipped
    assert first.changes + len(first.skipped) == 1
    assert ctx.remaining == ctx.skipped
    return [why for _, why in first.skipped]


def lowered(*arguments: Any, cpu: str = "vnni", **options: Any) -> gs.Graph:
    model = graph(*arguments, **options)
    assert lower(model, cpu) == []
    assert prove(model) == []
    return model


def ops(model: gs.Graph) -> list[str]:
    return [node.op for node in model.nodes]


def outputs(model: gs.Graph, **feeds: Any) -> Any:
    (result,) = Session(model_from_graph(model), threads=1).run(feeds).values()
    return result


def integers(shape: tuple[int, ...], dtype: str) -> Any:
    info = np.iinfo(dtype)
    return RANDOM.integers(info.min, info.max + 1, shape).astype(dtype)


def steps(scale: Any, dtype: str) -> Any:
    """A scale for 8 bits; the 256th for 16, so that sums mean as much."""
    return scale / np.float32(1 if GRIDS[dtype].bits == 8 else 256)


def reference(
    acc: Any, units: Any, y: str = "int8", zero_point: int = 0, bias: Any = 0, reach: int = 0
) -> Any:
    """What the law says of sums in `units`, `reach` at most; the bias is real."""
    grid, addend = GRIDS[y], np.rint(bias / np.asarray(units, np.float64)).astype(np.int64)
    limits = {"low": grid.low, "high": grid.high}
    bits = min(31, 62 - reach.bit_length())
    multiplier = dyadic(units / np.float64(YS), 62 - grid.bits, bits)
    return requantize(acc, multiplier, bias=addend, zero_point=zero_point, **limits)


LAYER = {
    "c = MatMul(a, b)": (-128, 127),
    "s = MatMul(a, b) r = Add(s, bias) c = Relu(r)": (-7, 127),
    "s = MatMul(a, b) r = Add(bias, s) c = Clip(r, low, high)": (-27, 33),
    "s = MatMul(a, b) c = Add(s, bias)": (-128, 127),
    "r = Gemm(a, b, bias) c = Relu(r)": (-7, 127),
}


@pytest.mark.parametrize("body", LAYER)
def test_a_linear_layer_becomes_one_product_and_a_requantisation(body: str) -> None:
    w, scales = integers((12, 5), "int8"), np.linspace(0.001, 0.02, 5, dtype=np.float32)
    bias = np.linspace(-2, 2, 5, dtype=np.float32)
    given_ = {"xz": np.uint8(100), "w": w, "ws": scales, "wz": np.zeros(5, np.int8)}
    given_ |= {"yz": np.int8(-7), "bias": bias, "low": np.float32(-1), "high": np.float32(2)}
    inputs = f"uint8[{'m' if 'Gemm' in body else '2, m'}, 12] x"
    model = lowered(inputs, body, **given_)
    assert ops(model)[0] == "MatMulInteger"
    assert set(ops(model)[1:]) <= set(TAIL)
    x = integers((7, 12) if "Gemm" in body else (2, 7, 12), "uint8")
    acc = (x.astype(np.int64) - 100) @ w.astype(np.int64)
    expected = reference(acc, XS.astype(float) * scales, "int8", -7, bias * ("bias" in body))
    result = outputs(model, x=x)
    np.testing.assert_array_equal(result, np.clip(expected, *LAYER[body]))
    # Against floats: the bias is rounded, by at most 0.004 steps of the result, and sums in
    # float32 by far less; so 1 element in 100 may round the other way.
    moved = result.astype(int) - outputs(graph(inputs, body, **given_), x=x)
    assert np.abs(moved).max() <= 1
    assert (moved != 0).mean() <= 0.02


SHAPES = [
    ((5,), (5, 3)),
    ((4, 5), (5, 3)),
    ((2, 4, 5), (5, 3)),
    ((2, 4, 5), (2, 5, 3)),
    ((1, 4, 5), (3, 5, 2)),
    ((4, 5), (3, 5, 2)),
    ((2, 1, 4, 5), (3, 5, 2)),
    ((2, 4, 5), (5,)),
    ((5,), (5,)),
    ((3, 4, 1), (1, 6)),
]
BYTES, GRID_NAMES = st.sampled_from(["int8", "uint8"]), st.sampled_from(sorted(GRIDS))


@law
@given(st.data(), st.sampled_from(SHAPES), GRID_NAMES, BYTES, GRID_NAMES)
def test_products_with_a_constant_are_exact(
    data: st.DataObject, shapes: Any, x_type: str, w_type: str, y: str
) -> None:
    """The constant on either side; one scale, or one per row on the left, column on the right."""
    side = data.draw(st.sampled_from([0, 1]))
    w, x = integers(shapes[side], w_type), integers(shapes[1 - side], x_type)
    axis = side - 2
    channels = w.shape[axis] if w.ndim > 1 and data.draw(st.booleans()) else 1
    scales = np.geomspace(0.001, 0.05, channels, dtype=np.float32)
    xz, wz = (data.draw(st.integers(np.iinfo(t).min, np.iinfo(t).max)) for t in (x_type, w_type))
    given_ = {"w": w, "ws": scales, "wz": np.full(channels, wz, w_type)}
    if channels == 1:
        given_ = {"w": w, "ws": scales[0], "wz": np.asarray(wz, w_type)}
    body = "c = MatMul(a, b)" if side else "c = MatMul(b, a)"
    xs = steps(XS, x_type)
    given_ |= {"xs": xs, "xz": np.asarray(xz, x_type)}
    dims = ", ".join(map(str, x.shape))
    model = lowered(f"{x_type}[{dims}] x", body, y=y, axis=axis, **given_)
    factors = [x.astype(np.int64) - xz, w.astype(np.int64) - wz]
    acc = np.matmul(*(factors if side else reversed(factors)))
    units = xs.astype(float) * scales
    if channels > 1 and side == 0 and x.ndim > 1:
        units = units[:, None]
    expected = reference(acc, units if channels > 1 else units[0], y)
    np.testing.assert_array_equal(outputs(model, x=x), expected)


def largest(dtype: str, zero_point: int) -> int:
    """The largest magnitude of an integer less the zero point."""
    return max(zero_point - GRIDS[dtype].low, GRIDS[dtype].high - zero_point)


@law
@given(st.data(), st.sampled_from(SHAPES), GRID_NAMES, GRID_NAMES, GRID_NAMES)
def test_products_of_two_activations_are_exact(
    data: st.DataObject, shapes: Any, x_type: str, w_type: str, y: str
) -> None:
    x, w = integers(shapes[0], x_type), integers(shapes[1], w_type)
    xz, wz = (data.draw(st.integers(np.iinfo(t).min, np.iinfo(t).max)) for t in (x_type, w_type))
    dims = [", ".join(map(str, values.shape)) for values in (x, w)]
    xs, ws = steps(XS, x_type), steps(WS, w_type)
    given_ = {"ws": ws, "wz": np.asarray(wz, w_type), "xs": xs, "xz": np.asarray(xz, x_type)}
    model = lowered(
        f"{x_type}[{dims[0]}] x, {w_type}[{dims[1]}] w",
        y=y,
        cpu=data.draw(st.sampled_from(["any", "vnni"])),
        **given_,
    )
    reals = x.astype(np.int64) - xz, w.astype(np.int64) - wz
    reach = x.shape[-1] * largest(x_type, xz) * largest(w_type, wz)
    expected = reference(np.matmul(*reals), xs.astype(float) * ws, y, reach=reach)
    np.testing.assert_array_equal(outputs(model, x=x, w=w), expected)


def attention(x: str, w: str) -> gs.Graph:
    given_: dict[str, Any] = {"xz": np.zeros((), x), "wz": np.zeros((), w), "ws": WS}
    return lowered(f"{x}[2, 4, 8] x, {w}[2, 8, 4] w", **given_)


@pytest.mark.parametrize("side", ["x", "w"])
def test_any_processor_gets_uint8_on_both_sides(side: str) -> None:
    given_: dict[str, Any] = {"xz": np.int8(3), "wz": np.int8(-5), "ws": WS}
    stored = {side: integers((4, 4), "int8")}
    text = "int8[4, 4] w" if side == "x" else "int8[4, 4] x"
    fast, safe = (graph(text, **given_, **stored) for _ in range(2))
    assert lower(fast, "vnni") == lower(safe, "any") == []
    (node,) = (n for n in safe.nodes if n.op == "MatMulInteger")
    assert [t.dtype for t in node.inputs] == [np.uint8] * 4
    feeds = {"x" if side == "w" else "w": integers((4, 4), "int8")}
    np.testing.assert_array_equal(outputs(fast, **feeds), outputs(safe, **feeds))


def test_no_other_processor_is_known() -> None:
    with pytest.raises(IntqError, match="cpu 'arm'; expected 'any' or 'vnni'"):
        parse("integerize_matmul(cpu='arm')")[0].run(graph("int8[4, 4] x, int8[4, 4] w"), Context())


def test_factors_become_uint8_on_the_left_and_int8_on_the_right() -> None:
    shift = ["Cast", "Add", "Cast"]
    for types, expected in (
        (("uint8", "int8"), []),
        (("int8", "int8"), shift),
        (("uint8", "uint8"), shift),
        (("int8", "uint8"), [*shift, *shift]),
    ):
        model = attention(*types)
        assert ops(model)[: ops(model).index("MatMulInteger")] == expected
        (node,) = (n for n in model.nodes if n.op == "MatMulInteger")
        assert [t.dtype for t in node.inputs[:2]] == [np.uint8, np.int8]


GEMM = st.fixed_dictionaries({
    "alpha": st.sampled_from([0.5, 1.0, 3.0]),
    "beta": st.sampled_from([-2.0, 0.0, 1.0]),
    "transA": st.booleans(),
    "transB": st.booleans(),
})  # fmt: skip


@law
@given(GEMM, st.sampled_from([(), (1,), (3,), (1, 3), (4, 1), (4, 3)]), st.sampled_from("xwb"))
def test_gemm_takes_transpositions_factors_and_a_bias_along(
    attrs: dict[str, Any], bias_shape: tuple[int, ...], computed: str
) -> None:
    x, w = integers((6, 4) if attrs["transA"] else (4, 6), "uint8"), integers((6, 3), "int8")
    w = np.ascontiguousarray(w.T) if attrs["transB"] else w
    bias = np.asarray(RANDOM.uniform(-1, 1, bias_shape), np.float32)
    given_: dict[str, Any] = {"xz": np.uint8(90), "wz": np.int8(0), "ws": WS, "bias": bias}
    given_ |= {} if computed in "wb" else {"w": w}
    given_ |= {} if computed in "xb" else {"x": x}
    texts = {
        "x": f"uint8[{x.shape[0]}, {x.shape[1]}] x",
        "w": f"int8[{w.shape[0]}, {w.shape[1]}] w",
    }
    inputs = [text for name, text in texts.items() if name not in given_]
    options = ", ".join(
        f"{k} = {float(v) if k in ('alpha', 'beta') else int(v)}" for k, v in attrs.items()
    )
    model = lowered(", ".join(inputs), f"c = Gemm<{options}>(a, b, bias)", **given_)
    a, b = (v.T if t else v for v, t in ((x, attrs["transA"]), (w, attrs["transB"])))
    acc = (a.astype(np.int64) - 90) @ b.astype(np.int64)
    units = XS.astype(float) * WS * attrs["alpha"]
    expected = reference(acc, units, bias=bias.astype(float) * attrs["beta"])
    feeds = {name: v for name, v in (("x", x), ("w", w)) if name not in given_}
    np.testing.assert_array_equal(outputs(model, **feeds), expected)


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("side", [0, 1])
def test_gemm_weights_keep_their_scales_when_transposed(trans: int, side: int) -> None:
    w, scales = integers((6, 6), "int8"), np.geomspace(0.001, 0.02, 6, dtype=np.float32)
    x = integers((6, 6), "uint8")
    axis = (side if not trans else 1 - side) if side else (1 if trans else 0)
    given_ = {"xz": np.uint8(9), "w": w, "ws": scales, "wz": np.zeros(6, np.int8)}
    body = f"c = Gemm<transB = {trans}>(a, b)" if side else f"c = Gemm<transA = {trans}>(b, a)"
    model = lowered("uint8[6, 6] x", body, axis=axis, **given_)
    factors = [x.astype(np.int64) - 9, (w.T if trans else w).astype(np.int64)]
    acc = np.matmul(*(factors if side else reversed(factors)))
    units = XS.astype(float) * scales
    np.testing.assert_array_equal(
        outputs(model, x=x), reference(acc, units if side else units[:, None])
    )


@pytest.mark.parametrize("shape", [(7, 5), (5,), (), (7, 1), (1, 2, 1, 1), (3, 7, 5), (1, 7, 5)])
@pytest.mark.parametrize("side", [0, 1])
def test_any_bias_is_added(shape: tuple[int, ...], side: int) -> None:
    """A position's code, say, is no vector: it is added to the sums."""
    x, w = integers((2, 7, 9), "uint8"), integers((9, 5), "int8")
    if side == 0:
        x, w = integers((2, 9, 5), "uint8"), integers((7, 9), "int8")
    bias = np.asarray(RANDOM.uniform(-1, 1, shape), np.float32)
    scales = np.geomspace(0.01, 0.02, w.shape[side], dtype=np.float32)
    zeros = np.zeros(w.shape[side], np.int8)
    given_ = {"w": w, "ws": scales, "wz": zeros, "xz": np.uint8(0), "bias": bias}
    body = "s = MatMul(a, b) c = Add(s, bias)" if side else "s = MatMul(b, a) c = Add(s, bias)"
    dims = f"{x.shape[1]}, {x.shape[2]}"
    if shape == (3, 7, 5):
        x, dims = x[:1], f"1, {dims}"
    elif len(shape) == 4:
        dims = f"2, {dims}"
    else:
        dims = f"n, {dims}"
    model = lowered(f"uint8[{dims}] x", body, axis=side - 2, **given_)
    acc = np.matmul(*([x.astype(int), w.astype(int)] if side else [w.astype(int), x.astype(int)]))
    units = XS.astype(float) * (scales if side else scales[:, None])
    steps = np.rint(bias.astype(float) / units).astype(np.int64)
    np.testing.assert_array_equal(outputs(model, x=x), reference(acc + steps, units))


@pytest.mark.parametrize("y", GRIDS)
@pytest.mark.parametrize("fill", [0, 255])
def test_the_largest_sums_are_exact(y: str, fill: int) -> None:
    x = np.full((2, 1024), fill, np.uint8)
    w = np.full((1024, 3), [-128, 127, 0], np.int8)
    given_: dict[str, Any] = {"w": w, "ws": WS, "wz": np.int8(0), "xz": np.uint8(255 - fill)}
    given_["ys"] = np.float32(1)
    bias = np.array([-5, 5, 0.3], np.float32) * 255 * 128
    model = lowered(
        "uint8[2, 1024] x", "s = MatMul(a, b) c = Add(s, bias)", y=y, bias=bias, **given_
    )
    acc = (x.astype(np.int64) - 255 + fill) @ w.astype(np.int64)
    units = XS.astype(float) * WS
    grid = GRIDS[y]
    expected = np.clip(np.floor((acc + np.rint(bias / units)) * units + 0.5), grid.low, grid.high)
    assert np.abs(acc).max() == 1024 * 255 * 128
    np.testing.assert_array_equal(outputs(model, x=x), expected)


def test_a_dynamic_sum_is_bounded_by_the_longest_axis() -> None:
    constants: dict[str, Any] = {"xz": np.uint8(128), "wz": np.int8(0), "ws": WS}
    text = "uint8[h, t, t2] x, int8[h, t2, d] w"
    assert ops(lowered(text, **constants))[0] == "MatMulInteger"
    assert lowered("uint8[h, t, 500] x, int8[h, t2, d] w", **constants | {"xz": np.uint8(0)})
    assert lowered("uint8[h, t, t2] x, int8[h, 500, d] w", **constants | {"xz": np.uint8(0)})
    (why,) = lower(graph(text, **constants | {"xz": np.uint8(0), "wz": np.int8(9)}))
    assert why.startswith("an accumulator exceeds 32 bits")


WEIGHT: dict[str, Any] = {
    "w": np.ones((4, 3), np.int8),
    "ws": WS,
    "wz": np.int8(0),
    "xz": np.uint8(0),
}
BIG = np.full(3, 1e9, np.float32)
DECLINED: list[tuple[str, str, dict[str, Any], str]] = [
    ("uint8[2, 4] x", "c = Gemm<alpha = -1.0>(a, b)", {}, "its alpha is -1; expected a positive"),
    ("uint8[2, 4] x", "c = MatMul(b, f)", {"f": np.ones((3, 2), np.float32)}, "both its factors"),
    ("uint8[2, 4] x", "c = MatMul(a, f)", {"f": np.ones((4, 2), np.float32)}, "its weight 'f' is"),
    (
        "uint8[2, 4] x",
        "c = MatMul(a, b)",
        {"ws": np.ones(4, np.float32), "wz": np.zeros(4, np.int8), "axis": 0},
        "its weight has scales along the axis that is summed",
    ),
    (
        "uint8[2, 4] x",
        "c = MatMul(a, b)",
        {"w": np.ones(4, np.int8), "ws": np.ones(4, np.float32), "wz": np.zeros(4, np.int8)},
        "its weight has scales along the axis that is summed",
    ),
    (
        "uint8[2, 4] x",
        "c = MatMul(a, b)",
        {
            "w": np.array([[0, 255]] * 4, np.uint8),
            "ws": np.ones(2, np.float32),
            "wz": np.array([255, 0], np.uint8),
        },
        "its weights span -255..255, over 8 bits",
    ),
    ("uint8[2, 4] x, float[3] f", "c = Gemm(a, b, f)", {}, "its third input is computed"),
    ("uint8[2, 4] x", "c = Gemm(a, b, f)", {"f": BIG}, "its bias exceeds 32"),
    ("uint8[2, 4] x, float[4, 3] f", "c = MatMul(a, f)", {}, "its input 'f' is not quantized"),
]


@pytest.mark.parametrize(("inputs", "body", "constants", "why"), DECLINED)
def test_declines_with_the_reason(
    inputs: str, body: str, constants: dict[str, Any], why: str
) -> None:
    model = graph(inputs, body, **WEIGHT | constants)
    before = len(model.nodes)
    (found,) = lower(model)
    assert found.startswith(why)
    assert len(model.nodes) == before


def test_declines_an_unknown_rank() -> None:
    model, ctx = graph("uint8[2, 3] x", "c = MatMul(b, a)", **WEIGHT), Context()
    model.tensors()["a"].shape = None
    assert IntegerizeMatmul().run(model, ctx) == 0
    assert ctx.remaining == [("MatMul_2", "the rank of its input 'a' is unknown")]
