"""After it, every float tensor between operators lies on an integer grid; the function stays."""

import json
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq import registry
from onnx_intq.graph import graph_from_model, metadata, model_from_graph
from onnx_intq.lowering import GRIDS, GRIDS_KEY, fused, is_float, parameters
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, IntqError, Range, run
from onnx_intq.verify import well_formed

XS, YS = np.float32(0.02), np.float32(0.05)
RANDOM = np.random.default_rng(0)
POINTS: dict[str, Any] = {
    "xs": XS,
    "xz": np.uint8(100),
    "ys": YS,
    "yz": np.uint8(7),
    "w": RANDOM.standard_normal((3, 4, 1)).astype(np.float32),
    "m": RANDOM.standard_normal((8, 5)).astype(np.float32),
    "bias": RANDOM.standard_normal(5).astype(np.float32),
    "k": np.float32(2),
}
X = "float[2, 4, 8] x"
START = "p = QuantizeLinear(x, xs, xz) a = DequantizeLinear(p, xs, xz)"
INPUT = RANDOM.uniform(-1.9, 3, (2, 4, 8)).astype(np.float32)


def graph(body: str, inputs: str = X, outputs: str = "float y", opset: int = 21, **c: Any) -> Any:
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    for value in model.graph.output:
        if not value.type.tensor_type.shape.dim:
            value.type.tensor_type.ClearField("shape")
    for name, values in (POINTS | c).items():
        if name in body:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def complete(model: gs.Graph, ranges: dict[str, Range] | None = None, cpu: str = "any") -> Context:
    """Complete; doing so again must change nothing."""
    ctx, spec = (
        Context(facts={"quantized"}, ranges=ranges or {}),
        registry.parse(f"complete_qdq(cpu={cpu!r})")[0],
    )
    (first,) = run(model, [spec], ctx, [well_formed])
    before = model_from_graph(model).SerializeToString(deterministic=True)
    again = Context(facts={"quantized"}, ranges=ranges or {})
    (second,) = run(model, [spec], again, [well_formed])
    assert second.changes == 0
    assert again.remaining == ctx.remaining == list(first.skipped)
    assert model_from_graph(model).SerializeToString(deterministic=True) == before
    assert "complete" in ctx.facts
    return ctx


def completed(*arguments: Any, ranges: Any = None, cpu: str = "any", **options: Any) -> Any:
    model = graph(*arguments, **options)
    assert complete(model, ranges, cpu).remaining == []
    assert_complete(model)
    return model


def assert_complete(model: gs.Graph) -> None:
    """Every float result is fused, or read by one QuantizeLinear and nothing else."""
    for node in model.nodes:
        if is_float(node) and len(fused(model, node)) == 1:
            for tensor in node.outputs:
                assert [n.op for n in tensor.outputs] == ["QuantizeLinear"]
                assert not any(tensor is t for t in model.outputs)


def grids(model: gs.Graph) -> dict[str, Any]:
    """Float tensor -> type, scale, zero point of its integers."""
    found: dict[str, Any] = {}
    for node in model.nodes:
        grid = parameters(node, node.outputs[0]) if node.op == "QuantizeLinear" else None
        if grid is not None:
            dtype = grid.grid.dtype.name
            found[node.inputs[0].name] = dtype, grid.scale, grid.zero_point
    return found


def outputs(model: gs.Graph, x: Any = INPUT, **feeds: Any) -> Any:
    """As the nodes say: some fusions of onnxruntime's optimizer fail on such graphs."""
    return Session(model_from_graph(model), threads=1, optimize=False).run({"x": x} | feeds)


# It fires


WIDTHS = {"x": "8", "b": "8", "c": "int16", "d": "8", "e": "int16", "y": "int16", "z": "int16"}


@pytest.mark.parametrize("cpu", ["any", "vnni"])
def test_results_get_16_bits_and_what_products_read_8(cpu: str) -> None:
    body = f"{START} b = Sigmoid(a) c = Conv(b, w) d = Tanh(c) e = Neg(d) y = MatMul(d, m)"
    model = completed(f"{body} z = Abs(e)", outputs="float y, float z", cpu=cpu)
    found = {name.removesuffix("_float"): grid for name, grid in grids(model).items()}
    eight = "int8" if cpu == "vnni" else "uint8"
    kinds = {name: eight if bits == "8" else bits for name, bits in WIDTHS.items()}
    kinds["d"] = "uint8"  # the left factor
    assert {name: dtype for name, (dtype, _, _) in found.items()} == kinds
    # From 0 to 1, and from -1 to 1.
    assert found["b"][1:] == (pytest.approx(1 / 255), -128 if cpu == "vnni" else 0)
    assert found["d"][1:] == (pytest.approx(2 / 255), 127)
    assert [t.name for t in model.outputs] == ["y", "z"]
    assert model.opset == 21


def test_calibrated_ranges_come_first_and_those_of_operands_help() -> None:
    body = f"{START} b = Neg(a) c = Sigmoid(b) y = Neg(c)"
    ranges = {"x": (-99.0, 99.0), "b": (-1.0, 2.0), "c": (0.0, 0.5)}
    found = grids(completed(body, ranges=ranges))
    assert found["x"] == ("uint8", float(XS), 100)
    step = pytest.approx(3 / 65535)
    assert found["b"] == ("int16", step, round(65535 / 3) - 32768)
    assert found["c"] == ("int16", pytest.approx(0.5 / 65535), -32768)
    # A half of -1.
    assert found["y_float"] == ("int16", pytest.approx(0.5 / 65535), 32767)


def test_an_input_without_a_pair_gets_one() -> None:
    body = f"{START} b = Neg(a) c = Conv(z, w) y = Mul(b, z)"
    inputs = f"{X}, float[2, 4, 8] z, float[2] unread, int64[2] length"
    outs = "float y, float c"
    found = grids(completed(body, inputs, outs, ranges={"z": (-1.0, 1.0)}))
    assert found["z"] == ("uint8", pytest.approx(2 / 255), 127)
    assert "unread" not in found


def test_an_input_is_read_through_one_pair() -> None:
    """A quantizer that was there reads the new pair: the boundary has one node per input."""
    body = f"{START} b = Neg(a) y = Mul(b, x)"
    model = completed(body, ranges={"x": (-2.0, 3.0)})
    assert [n.op for n in model.inputs[0].outputs] == ["QuantizeLinear"]
    assert grids(model)["x"][0] == "int16"
    assert grids(model)["x_dq"] == ("uint8", float(XS), 100)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("b = Conv(a, w) c = Relu(b) y = Neg(c)", "c"),
        ("b = Mul(a, a) c = Clip(b, k) y = Neg(c)", "c"),
        ("b = MatMul(a, m) d = Add(b, bias) c = Relu(d) y = Neg(c)", "c"),
        ("b = MatMul(a, m) c = Add(bias, b) y = Neg(c)", "c"),
    ],
)
def test_an_activation_stays_with_its_operator(body: str, name: str) -> None:
    found = grids(completed(f"{START} {body}"))
    assert found.keys() == {"x", name, "y_float"}


@pytest.mark.parametrize(
    "move",
    ["Transpose(a)", "Reshape(a, shape)", "MaxPool<kernel_shape = [2]>(a)", "Pad(a, pads)"],
)
@pytest.mark.parametrize("reader", ["Neg(b)", "MatMul(b, v)"])
def test_moved_values_keep_their_grid(move: str, reader: str) -> None:
    constants: dict[str, Any] = {"shape": np.array([2, 4, 8]), "pads": np.array([0, 0, 1, 0, 0, 1])}
    width = {"T": 2, "R": 8, "M": 7, "P": 10}[move[0]]
    constants["v"] = np.ones((width, 3), np.float32)
    found = grids(completed(f"{START} b = {move} y = {reader}", cpu="vnni", **constants))
    # Unsigned on the left of a product: the same values, whatever the type.
    expected = {"N": ("int8", -28), "M": ("uint8", 100)}[reader[0]]
    assert found["b"] == (expected[0], float(XS), expected[1])
    assert found["x"] == (expected[0], float(XS), expected[1])


BEHIND = {
    "b = Where(mask, x, k)": 1,
    "t = Transpose(x) b = Reshape(t, shape)": 2,
    "b = Max(x, k)": 1,
    "n = Shape(x) b = Expand(x, n)": 1,
}
END = "p = QuantizeLinear(b, xs, xz) y = DequantizeLinear(p, xs, xz)"


@pytest.mark.parametrize("body", BEHIND)
def test_what_is_quantized_behind_a_move_is_quantized_before(body: str) -> None:
    """No range is needed, and the function stays: rounding may come before a move."""
    inputs, shape = "float[n, 4, 8] x, bool[n, 4, 8] mask", np.array([-1, 4, 8])
    model = graph(f"{body} {END}", inputs, shape=shape)
    x = np.concatenate([INPUT, INPUT * 9, np.rint(INPUT / XS) * XS + XS / 2])
    mask = RANDOM.random(x.shape) < 0.5
    before = outputs(model, x, mask=mask)["y"]
    assert complete(model).remaining == []
    assert list(grids(model).values()) == [("uint8", float(XS), 100)] * (BEHIND[body] + 1)
    np.testing.assert_array_equal(outputs(model, x, mask=mask)["y"], before)


OTHERS = ["c = Neg(b)", "c = Transpose(b)", "q = QuantizeLinear(b, ys, yz) c = Cast<to = 1>(q)"]


@pytest.mark.parametrize("other", OTHERS)
def test_other_readers_need_a_grid_of_their_own(other: str) -> None:
    body = f"b = Transpose(x) {END} {other}"
    (left, *_) = complete(graph(body, outputs="float y, float c")).remaining
    assert left[0] == "x"
    model = graph(body, outputs="float y, float c")
    complete(model, {"x": (-4.0, 4.0)})
    assert grids(model)["x"] == ("int16", pytest.approx(8 / 65535), 0)


def test_masked_logits_reach_no_further_than_a_softmax_sees() -> None:
    body = "b = Where(mask, a, low) y = Softmax(b)"
    inputs, low = f"{X}, bool[2, 4, 8] mask", np.float32(-1e9)
    model = completed(f"{START} {body}", inputs, low=low)
    dtype, step, _ = grids(model)["b"]
    assert (dtype, step) == ("int16", pytest.approx((155 * XS + 100 * XS + 24) / 65535))
    mask = RANDOM.random((2, 4, 8)) < 0.7
    before = outputs(graph(f"{START} {body}", inputs, low=low), mask=mask)["y"]
    moved = np.abs(outputs(model, mask=mask)["y"] - before)
    # Logits move by half a step: probabilities by a quarter of that, and half a step of theirs.
    assert moved.max() <= step / 8 + 2.0**-16
    unmasked = completed(f"{START} b = Where(mask, a, low) y = Neg(b)", inputs, low=low)
    assert grids(unmasked)["b"][1] == pytest.approx(1e9 / 65535, rel=1e-3)


# The types that are multiplied fast

FIXED = {"Conv(a, w)": "int8", "MatMul(a, m)": "uint8", "Neg(a)": "int8"}
"""The type of a for processors with VNNI."""


@pytest.mark.parametrize("call", FIXED)
@pytest.mark.parametrize("dtype", GRIDS)
@pytest.mark.parametrize("cpu", ["any", "vnni"])
def test_grids_that_were_there_mean_the_same_values(call: str, dtype: str, cpu: str) -> None:
    info = np.iinfo(dtype)
    middle = (info.min + info.max) // 2 + 3
    points: dict[str, Any] = {"xz": np.asarray(middle, dtype), "yz": np.asarray(middle - 9, dtype)}
    body = f"{START} b = {call} c = QuantizeLinear(b, ys, yz) y = DequantizeLinear(c, ys, yz)"
    model = graph(body, inputs="float[n, 4, 8] x", **points)
    x = np.concatenate([INPUT, INPUT * 300, np.rint(INPUT / XS) * XS + XS / 2])
    before = outputs(model, x)["y"]
    complete(model, cpu=cpu)
    np.testing.assert_array_equal(outputs(model, x)["y"], before)
    kinds = {name: dtype for name, (dtype, _, _) in grids(model).items()}
    fast = {"b": "int8", "x": FIXED[call]} if cpu == "vnni" else {"b": "uint8", "x": "uint8"}
    assert kinds == ({"b": "int16", "x": "int16"} if info.bits == 16 else fast)


def test_types_that_others_see_stay() -> None:
    body = f"{START} y = DequantizeLinear(p, xs, xz)"
    model = graph(body, outputs="float y, uint8 p")
    complete(model)
    assert [t.dtype for t in model.outputs] == [np.float32, np.uint8]
    cast = "c = Cast<to = 7>(p) b = Neg(a) y = Abs(b)"
    model = graph(f"{START} {cast}", outputs="float y, int64 c")
    before = outputs(model)["c"]
    complete(model)
    np.testing.assert_array_equal(outputs(model)["c"], before)


def test_a_pair_with_two_grids_keeps_both() -> None:
    body = "p = QuantizeLinear(x, xs, xz) y = DequantizeLinear(p, ys, yz)"
    model = graph(body)
    before = outputs(model)["y"]
    complete(model, cpu="vnni")
    np.testing.assert_array_equal(outputs(model)["y"], before)


def test_types_named_by_an_attribute_are_shifted_too() -> None:
    body = "p = QuantizeLinear<output_dtype = 2>(x, xs) y = DequantizeLinear(p, xs)"
    model = graph(body)
    before = outputs(model)["y"]
    complete(model, cpu="vnni")
    assert grids(model) == {"x": ("int8", float(XS), -128)}
    np.testing.assert_array_equal(outputs(model)["y"], before)


def test_names_in_use_are_not_taken() -> None:
    body = """p = QuantizeLinear(x, xs, p_zero_point) a = DequantizeLinear(p, xs, p_zero_point)
        y_q = Neg(a) y = Neg(y_q)"""
    completed(body, p_zero_point=np.uint8(3))


# The law


LAWFUL = [
    "b = Sigmoid(a) c = Mul(a, b) d = Add(c, k) y = Tanh(d)",
    "b = Conv(a, w) c = Relu(b) y = Softmax<axis = 1>(c)",
    "b = MatMul(a, m) c = Add(b, bias) d = Neg(c) y = Abs(d)",
    "b = Transpose(a) c = Neg(b) y, z = Split<num_outputs = 2>(c)",
]


@pytest.mark.parametrize("body", LAWFUL)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_function_moves_by_half_a_step_of_every_grid_that_is_added(
    body: str, seed: int
) -> None:
    model = graph(f"{START} {body}", outputs="float y, float z" if " z" in body else "float y")
    x = np.random.default_rng(seed).uniform(-3, 4, (2, 4, 8)).astype(np.float32)
    before = outputs(model, x)
    complete(model)
    steps = [scale for name, (_, scale, _) in grids(model).items() if name != "x"]
    # Each rounding is carried on by factors of at most 6: weights of a row sum to less, and a * b
    # is within 6 b. Nothing here is steeper.
    allowed = sum(steps) / 2 * 6
    for name, values in outputs(model, x).items():
        assert np.abs(values - before[name]).max() <= allowed
    added = [n for n in grids(model) if n != "x"]
    assert len(added) == sum(n.op == "QuantizeLinear" for n in model.nodes) - 1


# It declines

RANGES = [
    (f"{START} b = Tan(a) y = Sigmoid(b)", {}, [("Tan_2", "b")]),
    ("b = Neg(x) p = QuantizeLinear(b, xs, xz) y = DequantizeLinear(p, xs, xz)", {}, [("x", "x")]),
    (f"{START} b = Div(k, a) y = Sigmoid(b)", {}, [("Div_2", "b")]),
    (f"{START} y = Add(a, k)", {"k": np.float32(-np.inf)}, [("Add_2", "y")]),
    (f"{START} y = Add(a, k)", {"k": np.float32(np.nan)}, [("Add_2", "y")]),
    (f"{START} y = Mul(a, k)", {"k": np.float32(1e38)}, [("Mul_2", "y")]),
]


@pytest.mark.parametrize(("body", "constants", "left"), RANGES)
def test_unknown_ranges_are_named(
    body: str, constants: dict[str, Any], left: list[tuple[str, str]]
) -> None:
    model = graph(body, **constants)
    found = complete(model).remaining
    assert [name for name, _ in found][: len(left)] == [name for name, _ in left]
    for (_, why), (_, tensor) in zip(found, left, strict=False):
        assert why.startswith(f"the range of its result {tensor!r} is unknown; expected")


def test_an_input_that_is_an_output_keeps_its_name() -> None:
    model = graph(f"{START} y = Neg(a)", outputs="float y, float[2, 4, 8] x")
    complete(model, {"x": (-1.0, 1.0)})
    assert [t.name for t in (*model.inputs, *model.outputs)] == ["x", "y", "x"]


def test_bodies_are_left_alone() -> None:
    body = f"""{START} y = If(b) <
        then_branch = t () => (float[2, 4, 8] u) {{
            r = QuantizeLinear(n, ys, yz) s = DequantizeLinear(r, ys, yz) t = Add(a, s)
            v = DequantizeLinear(p, xs, xz) u = Add(t, v) }},
        else_branch = e () => (float[2, 4, 8] z) {{ z = Relu(a) }}>"""
    model = graph(body, f"{X}, bool b", n=np.ones(8, np.float32))
    before = outputs(model, b=np.array(True))["y"]
    ctx = complete(model, {"y": (-10.0, 10.0)}, cpu="vnni")
    assert not ctx.remaining
    step = grids(model)["y_float"][1]
    assert np.abs(outputs(model, b=np.array(True))["y"] - before).max() <= step / 2 * 1.01


def test_what_nobody_reads_goes() -> None:
    model = completed(f"{START} b = Tan(a) c = Conv(b, w) y = Neg(a)")
    assert {"Tan", "Conv"}.isdisjoint(node.op for node in model.nodes)


def test_old_opsets_are_raised() -> None:
    model = completed(f"{START} y = Neg(a)", opset=13)
    assert model.opset == 21
    assert_complete(model)


# What is recorded


def test_integers_are_recorded_with_the_names_of_the_floats() -> None:
    body = f"{START} b = Conv(a, w) c = Relu(b) y = Neg(c)"
    model = completed(body)
    found = json.loads(metadata(model)[GRIDS_KEY])
    assert {q: name for q, (name, _, _) in found.items()} == {"p": "x", "c_q": "c", "y_q": "y"}
    for q, (_, scale, zero_point) in found.items():
        (maker,) = model.tensors()[q].inputs
        grid = parameters(maker, maker.outputs[0])
        assert grid is not None
        assert (grid.scale, grid.zero_point) == (scale, zero_point)


def test_what_was_recorded_stays_if_the_tensor_does() -> None:
    model = graph(f"{START} y = Neg(a)")
    recorded = {"a": ["kept", 1.0, 0], "gone": ["g", 1.0, 0], "p": ["old", 9.0, 9]}
    metadata(model)[GRIDS_KEY] = json.dumps(recorded)
    complete(model)
    found = json.loads(metadata(model)[GRIDS_KEY])
    assert found == {"a": ["kept", 1.0, 0], "p": ["x", float(XS), 100], "y_q": found["y_q"]}
    metadata(model)[GRIDS_KEY] = "?"
    with pytest.raises(IntqError, match=r"onnx_intq.grids cannot be read"):
        complete(model)
    with pytest.raises(IntqError, match=r"expected .*any"):
        complete(model, cpu="x86")
