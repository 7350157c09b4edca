"""Places to rewrite: what is one, what it says of the integers, and what goes in its stead."""

import json
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq import lowering
from onnx_intq.graph import graph_from_model
from onnx_intq.grid import Grid
from onnx_intq.lowering import (
    GRIDS,
    GRIDS_KEY,
    CannotLowerError,
    Operand,
    Site,
    activation_limits,
    constant_values,
    find,
    fused,
    is_float,
    lower,
    operand,
    parameters,
    readers,
    recorded_grids,
)
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.trace import Builder
from onnx_intq.transform import Context, IntqError
from onnx_intq.value import Value
from onnx_intq.verify import well_formed

DropIdentity = load("drop_identity")
law = settings(max_examples=60, deadline=None)
HEAD = "a = DequantizeLinear(x, xs, xz)"
TAIL = "q = QuantizeLinear(c, ys, yz)"
POINTS = {
    "xs": np.float32(0.5),
    "xz": np.int8(3),
    "ys": np.float32(0.25),
    "yz": np.uint8(100),
    "k": np.float32(2),
    "v": np.array([1, 2], np.float32),
}


def graph(body: str, inputs: str = "int8[n, 2] x", outputs: str = "uint8[n, 2] q", **c: Any) -> Any:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({outputs}) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    for name, values in (POINTS | c).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def around(body: str, **options: Any) -> Any:
    return graph(f"{HEAD} {body} {TAIL}", **options)


def node(model: gs.Graph, op: str) -> gs.Node:
    return next(n for n in model.nodes if n.op == op)


def tensor(model: gs.Graph, name: str) -> Any:
    return model.tensors()[name]


# Operands


def test_an_operand_knows_its_real_range() -> None:
    found = operand(tensor(around("c = Neg(a)"), "a"))
    assert found is not None
    assert (found.scale, found.zero_point, found.grid) == (0.5, 3, Grid(8, signed=True))
    assert (found.low, found.high) == (-131 * 0.5, 124 * 0.5)
    assert found.tensor.name == "x"
    other = operand(tensor(around("c = Neg(a)"), "a"))
    assert other is not None
    assert found.same_grid(other)
    scaled = operand(tensor(around("c = Neg(a)", xs=np.float32(0.4)), "a"))
    assert scaled is not None
    assert not found.same_grid(scaled)


@pytest.mark.parametrize(
    ("constants", "inputs"),
    [
        ({"xs": np.ones(2, np.float32), "xz": np.zeros(2, np.int8)}, "int8[n, 2] x"),
        ({"xz": np.int32(0)}, "int32[n, 2] x"),
    ],
)
def test_several_scales_and_other_types_are_no_operand(constants: Any, inputs: str) -> None:
    model = around("c = Neg(a)", inputs=inputs, **constants)
    assert operand(tensor(model, "a")) is None
    with pytest.raises(CannotLowerError, match="its input 'a' is not quantized"):
        find(model, node(model, "Neg")).operand(0)


def test_a_scale_of_one_element_and_no_zero_point_will_do() -> None:
    model = graph(f"a = DequantizeLinear(x, xs) c = Neg(a) {TAIL}", xs=np.ones(1, np.float32))
    found = operand(tensor(model, "a"))
    assert found is not None
    assert (found.scale, found.zero_point) == (1.0, 0)
    assert operand(tensor(model, "c")) is None


def test_a_scale_computed_at_run_time_is_no_operand() -> None:
    model = graph(
        f"s = Neg(k) a = DequantizeLinear(x, s, xz) c = Neg(a) {TAIL}",
    )
    assert operand(tensor(model, "a")) is None
    dq = node(model, "DequantizeLinear")
    dq.inputs[0].dtype = None
    assert parameters(dq, dq.inputs[0]) is None


# Constants

STORED = np.array([[-128, 127, 5], [0, -1, 1]], np.int8)
SCALES = np.array([0.1, 0.2], np.float32)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("channels", [None, 0, -2, 1])
def test_constants_are_dequantized_as_onnxruntime_does(signed: bool, channels: int | None) -> None:
    stored = STORED if signed else (STORED.astype(np.int64) + 128).astype(np.uint8)
    size = 1 if channels is None else stored.shape[channels]
    scales = np.linspace(0.1, 0.3, size).astype(np.float32)
    zeros = np.arange(size).astype(stored.dtype)
    given_: dict[str, Any] = {"w": stored, "s": scales, "z": zeros}
    if channels is None:
        given_ = {"w": stored, "s": scales[0], "z": zeros[0]}
    axis = 1 if channels is None else channels
    body = f"b = DequantizeLinear<axis = {axis}>(w, s, z) d = Neg(b)"
    model = graph(body, outputs="float[2, 3] d", **given_)
    found = constant_values(tensor(model, "b"))
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g () => (float[2, 3] d)
        {{ d = DequantizeLinear<axis = {axis}>(w, s, z) }}"""
    )
    for name, values in given_.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    assert found is not None
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, Session(proto, threads=1).run({})["d"])


def test_constants_without_zero_point_and_computed_tensors() -> None:
    body = "b = DequantizeLinear(w, k) d = Neg(b) e = DequantizeLinear<block_size = 1>(w, s)"
    model = graph(body, outputs="float d, float[2, 3] e", w=STORED, s=np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(constant_values(tensor(model, "b")), STORED * np.float32(2))
    assert constant_values(tensor(model, "d")) is None
    assert constant_values(tensor(model, "e")) is None
    assert constant_values(tensor(model, "x")) is None
    blocks = "b = DequantizeLinear<axis = 0, block_size = 2>(v, xs, xz) d = Neg(b)"
    scales: dict[str, Any] = {"xs": np.ones(2, np.float32), "xz": np.zeros(2, np.int8)}
    model = graph(blocks, outputs="float[4] d", v=np.ones(4, np.int8), **scales)
    assert constant_values(tensor(model, "b")) is None


# Places

CHAINS = [
    ("c = Conv(a, v)", ["Conv"]),
    ("s = Conv(a, v) c = Relu(s)", ["Conv", "Relu"]),
    ("s = Conv(a, v) c = Clip(s, k)", ["Conv", "Clip"]),
    ("s = Conv(a, v) c = Clip(s, , k)", ["Conv", "Clip"]),
    ("s = MatMul(a, v) t = Add(s, v) c = Relu(t)", ["MatMul", "Add", "Relu"]),
    ("s = MatMul(a, v) c = Add(v, s)", ["MatMul", "Add"]),
    ("s = Conv(a, v) c = Add(s, v)", ["Conv"]),
    ("s = MatMul(a, v) c = Add(s, a)", ["MatMul"]),
    ("s = Add(a, a) t = Relu(s) c = Clip(t, k)", ["Add", "Relu"]),
    ("s = Relu(a) c = Clip(s, k)", ["Relu"]),
    ("s = Conv(a, v) c = Sigmoid(s)", ["Conv"]),
    ("s = Conv(a, v) c = Clip(k, s)", ["Conv"]),
    ("s = Conv(a, v) c = Relu(s) t = Neg(s)", ["Conv"]),
    ("s, t = Split<num_outputs = 2>(a) c = Relu(s)", ["Split"]),
]


@pytest.mark.parametrize(("body", "ops"), CHAINS)
def test_what_runs_in_an_operator(body: str, ops: list[str]) -> None:
    model = around(body, inputs="int8[2] x", outputs="uint8 q")
    assert [n.op for n in fused(model, node(model, ops[0]))] == ops


def test_an_output_of_the_graph_is_not_fused() -> None:
    body = f"{HEAD} s = Neg(a) c = Relu(s) {TAIL}"
    model = graph(body, outputs="uint8[n, 2] q, float[n, 2] s")
    assert [n.op for n in fused(model, node(model, "Neg"))] == ["Neg"]


def test_a_place_is_described() -> None:
    model = around("s = MatMul(a, w) t = Add(s, v) c = Relu(t)", w=np.ones((2, 2), np.float32))
    site = find(model, node(model, "MatMul"))
    assert [n.op for n in site.chain] == ["MatMul", "Add", "Relu", "QuantizeLinear"]
    np.testing.assert_array_equal(site.bias, POINTS["v"])
    assert (site.first, site.last, site.index) == (100, 255, 0)
    assert (site.result.tensor.name, site.result.scale, site.result.zero_point) == ("q", 0.25, 100)
    np.testing.assert_array_equal(site.values(1), np.ones((2, 2)))
    assert site.values(0) is None
    assert site.values(2) is None


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("c = Neg(a) d = Neg(c)", "its result is not quantized once; run complete_qdq before"),
        ("d = Neg(a) c = Sigmoid(d)", "its result is not quantized once"),
        ("c = Neg(a) r = QuantizeLinear(c, ys, yz)", "its result is not quantized once"),
    ],
)
def test_what_is_no_place(body: str, why: str) -> None:
    model = around(body)
    with pytest.raises(CannotLowerError, match=why):
        find(model, node(model, "Neg"))


def test_results_need_one_scale() -> None:
    scales = {"ys": np.ones(2, np.float32), "yz": np.zeros(2, np.uint8)}
    model = around("c = Neg(a)", **scales)
    with pytest.raises(CannotLowerError, match="its result has no single constant scale"):
        find(model, node(model, "Neg"))


@law
@given(
    st.sampled_from(sorted(GRIDS)),
    st.floats(2.0**-10, 4, width=32),
    st.floats(-300, 300, width=32),
    st.floats(0, 300, width=32),
    st.sampled_from(["both", "low", "high", "none", "relu"]),
)
def test_limits_on_integers_are_the_limits_on_floats(
    y: str, scale: float, low: float, width: float, ends: str
) -> None:
    """clip(round(x)) = round(clip(x)), for rounding keeps order."""
    info, high = np.iinfo(y), np.float32(low + width)
    zero_point = (info.min + info.max) // 2 + 5
    limits = {"both": "low, high", "low": "low", "high": ", high", "none": ""}
    call = "Relu(x)" if ends == "relu" else f"Clip(x, {limits[ends]})"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => ({y}[n] q, {y}[n] p)
        {{ c = {call} q = QuantizeLinear(c, s, z) p = QuantizeLinear(x, s, z) }}"""
    )
    constants = {"s": np.float32(scale), "z": np.asarray(zero_point, y)}
    constants |= {"low": np.float32(low), "high": high}
    for name, values in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    model = graph_from_model(proto)
    result = Operand(tensor=model.outputs[0], scale=scale, zero_point=zero_point, grid=GRIDS[y])
    first, last = activation_limits(model.nodes[0], result)
    x = np.linspace(-700, 700, 999, dtype=np.float32)
    found = Session(proto, threads=1).run({"x": x})
    np.testing.assert_array_equal(np.clip(found["p"], first, last), found["q"])


def test_limits_in_the_wrong_order_are_the_higher_one() -> None:
    model = around("c = Clip(a, k, low)", low=np.float32(-1))
    assert activation_limits(node(model, "Clip"), find(model, node(model, "Clip")).result) == (
        96,
        96,
    )


def test_limits_must_be_known() -> None:
    model = around("c = Clip(a, f)", inputs="int8[n, 2] x, float f")
    site = find(model, node(model, "Clip"))
    with pytest.raises(CannotLowerError, match="its limits are computed at run time"):
        activation_limits(site.node, site.result)


def test_nodes_of_floats() -> None:
    body = "s = Shape(x) m = Mul(s, s) d = Expand(x, m) a = DequantizeLinear(d, xs, xz)"
    model = graph(f"{body} c = Cast<to = 1>(m) e = Cast<to = 7>(a) {TAIL}", outputs="int64[n] e")
    floats = [n.op for n in model.nodes if is_float(n)]
    assert floats == ["Cast", "Cast"]


def test_readers_behind_moves() -> None:
    body = "b = Transpose(a) p, r = Split<num_outputs = 2>(b) d = Neg(p) e = Abs(r) c = Sub(a, d)"
    model = around(body, outputs="float e, uint8[n, 2] q")
    found = readers(tensor(model, "a"), {"Transpose", "Split"})
    assert sorted(n.op for n in found) == ["Abs", "Neg", "Sub"]


# Rewriting


def negated(site: Site, builder: Builder) -> Value:
    x = site.operand(0).stored(builder)
    found = builder.node("Cast", [(-x).astype(np.int32)], np.uint8, to=onnx.TensorProto.UINT8)
    return builder.value(found, 0, 255)


def test_a_place_gives_way_to_its_integers() -> None:
    model, ctx = around("s = Neg(a) c = Relu(s)"), Context()
    assert lower(model, ctx, {"Neg"}, negated) == 1
    assert [n.op for n in model.nodes] == ["Cast", "Sub", "Cast"]
    assert [t.name for t in model.outputs] == ["q"]
    assert model.outputs[0].shape is not None
    assert not ctx.skipped
    assert lower(model, ctx, {"Neg"}, negated) == 0


def test_readers_of_the_result_read_the_integers() -> None:
    body = f"{HEAD} c = Neg(a) {TAIL} y = DequantizeLinear(q, ys, yz)"
    model = graph(body, outputs="float[n, 2] y")
    lower(model, Context(), {"Neg"}, negated)
    (dq,) = (n for n in model.nodes if n.op == "DequantizeLinear")
    assert dq.inputs[0].name == "q"
    assert dq.inputs[0].inputs[0].op == "Cast"


@pytest.mark.parametrize(
    ("body", "op"),
    [
        ("s = Neg(a) c = Relu(s)", "Relu"),
        ("s = MatMul(a, w) t = Add(s, v) c = Relu(t)", "Add"),
        ("s = MatMul(a, w) t = Add(s, v) c = Relu(t)", "Relu"),
        ("s = Add(a, a) c = Clip(s, k)", "Clip"),
    ],
)
def test_what_goes_with_another_operator_is_no_place(body: str, op: str) -> None:
    """So passes need no order: the operator before may be lowered later."""
    model, ctx = around(body, w=np.ones((2, 2), np.float32)), Context()
    assert lower(model, ctx, {op}, negated) == 0
    assert not ctx.skipped


def refused(site: Site, builder: Builder) -> Value:
    site.operand(0).centred(builder)
    raise CannotLowerError("it has no integer form")


def test_what_is_refused_leaves_no_trace() -> None:
    model, ctx = around("c = Neg(a)"), Context()
    assert lower(model, ctx, {"Neg"}, refused) == 0
    assert [n.op for n in model.nodes] == ["DequantizeLinear", "Neg", "QuantizeLinear"]
    assert ctx.remaining == [("Neg_1", "it has no integer form")]
    well_formed(DropIdentity(), model)
    ctx = Context()
    lower(model, ctx, {"Neg"}, refused, optional=True)
    assert (ctx.remaining, ctx.skipped) == ([], [("Neg_1", "it has no integer form")])
    ctx = Context()
    assert lower(model, ctx, {"Neg"}, negated, where=lambda n: n.name == "other") == 0
    assert not ctx.skipped


def test_every_output_that_is_read_is_a_place() -> None:
    body = f"{HEAD} c, d, e = Split<num_outputs = 3>(a) {TAIL} r = QuantizeLinear(e, ys, yz)"
    model, seen = graph(body, "int8[6] x", "uint8[2] q, uint8[2] r"), list[int]()

    def emit(site: Site, builder: Builder) -> gs.Tensor:
        seen.append(site.index)
        return builder.node("Cast", [site.operand(0).tensor], np.uint8, to=onnx.TensorProto.UINT8)

    assert lower(model, Context(), {"Split"}, emit) == 1
    assert seen == [0, 2]
    assert [t.name for t in model.outputs] == ["q", "r"]
    assert [n.op for n in model.nodes] == ["Cast", "Cast"]


def test_integers_of_another_type_are_a_bug() -> None:
    model = around("c = Neg(a)")
    with pytest.raises(AssertionError, match="Neg_1: int8, expected uint8"):
        lower(model, Context(), {"Neg"}, lambda site, _: site.operand(0).tensor)


def test_bodies_are_left_alone() -> None:
    body = f"""{HEAD} c = If(b) <then_branch = t () => (float[n, 2] u) {{ u = Neg(a) }},
        else_branch = e () => (float[n, 2] w) {{ w = Neg(a) }}> {TAIL}"""
    model = graph(body, "int8[n, 2] x, bool b")
    assert lower(model, Context(), {"Neg"}, negated) == 0


# Metadata


def test_recorded_grids_are_read_or_refused() -> None:
    grids = {"q": ["x", 0.5, -3]}
    assert recorded_grids({GRIDS_KEY: json.dumps(grids)}) == {"q": ("x", 0.5, -3)}
    assert recorded_grids({}) == {}
    for text in ("", "[]", "{", '{"q": 1}', '{"q": ["x", 1]}', '{"q": ["x", "s", 0]}', "null"):
        with pytest.raises(IntqError, match=r"onnx_intq.grids cannot be read .*; expected .*; qu"):
            recorded_grids({GRIDS_KEY: text})


def test_names_are_those_of_stored_types() -> None:
    assert {name: grid.dtype.name for name, grid in GRIDS.items()} == {n: n for n in GRIDS}
    assert lowering.GRIDS_KEY == "onnx_intq.grids"
