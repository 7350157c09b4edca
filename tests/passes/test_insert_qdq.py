from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.calibrate import calibrate
from onnx_intq.graph import constant, graph_from_model, model_from_graph
from onnx_intq.grid import Grid, affine, symmetric
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, PassError, run
from onnx_intq.verify import well_formed

InsertQdq = load("insert_qdq")
FACTS = {"bn-folded", "calibrated"}
FEEDS = {"x": np.random.default_rng(1).standard_normal((2, 4, 12)).astype(np.float32)}
BLOCK = """
    d1 = Conv<group = 4, pads = [1, 1]>(x, d)
    p1 = Conv(d1, p, c)
    a1 = Relu(p1)
    p2 = Conv(a1, q, c)
    r2 = Conv(x, r, c)
    s2 = Add(p2, r2)
    y = Relu(s2)
"""
WEIGHTS = {"d": (4, 1, 3), "p": (4, 4, 1), "q": (4, 4, 1), "r": (4, 4, 1), "c": (4,), "m": (4, 4)}
SMALL = 1e-3 * np.eye(4, dtype=np.float32)[..., None]


def graph(
    body: str = BLOCK, outputs: str = "float[n, 4, s] y", opset: int = 17, more: str = ""
) -> gs.Graph:
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[n, 4, t] x{more}) => ({outputs}) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for name, shape in WEIGHTS.items():
        values = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    model.graph.initializer.append(onnx.numpy_helper.from_array(SMALL, "t"))
    return graph_from_model(model)


def insert(model: gs.Graph, **options: Any) -> Context:
    """Calibrate and insert pairs; doing so again must change nothing."""
    ctx = Context(facts=set(FACTS), ranges=calibrate(model, [FEEDS], threads=1).select())
    spec = InsertQdq(**options)
    first, second = run(model, [spec, spec], ctx, [well_formed])
    assert first.changes > 0
    assert second.changes == 0
    assert {why for _, why in second.skipped} <= {
        "quantized already",
        *(w for _, w in first.skipped),
    }
    assert ctx.facts == FACTS | {"quantized"}
    ctx.skipped = list(first.skipped)
    return ctx


def quantized(model: gs.Graph) -> list[str]:
    """The float tensors that get a Q/DQ pair."""
    return sorted(n.inputs[0].name for n in model.nodes if n.op == "QuantizeLinear")


def reads(model: gs.Graph, result: str) -> list[str]:
    (node,) = (n for n in model.nodes if result in [t.name for t in n.outputs])
    return [t.name for t in node.inputs if isinstance(t, gs.Variable)]


def scale(model: gs.Graph, tensor: str) -> tuple[float, int, str]:
    (node,) = (n for n in model.nodes if n.name == f"{tensor}_q")
    step, zero = constant(node, 1), constant(node, 2)
    assert step is not None
    assert zero is not None
    return float(step), int(zero), str(zero.dtype)


def outputs(model: gs.Graph, **more: Any) -> dict[str, Any]:
    session = Session(model_from_graph(model), threads=1, optimize=False)
    return session.run({**FEEDS, **more})


def test_ort_gets_pairs_on_both_sides_and_none_before_an_activation() -> None:
    model = graph()
    ctx = insert(model)
    assert quantized(model) == ["a1", "d1", "p2", "r2", "x", "y_float"]
    assert [reads(model, name) for name in ("d1", "p1", "a1", "p2", "r2", "s2", "y_float")] == [
        ["x_dq"],
        ["d1_dq"],
        ["p1"],
        ["a1_dq"],
        ["x_dq"],
        ["p2_dq", "r2_dq"],
        ["s2"],
    ]
    assert not ctx.skipped
    assert [t.name for t in model.outputs] == ["y"]
    assert all(scale(model, name)[2] == "uint8" for name in ("x", "d1", "y"))
    assert scale(model, "a1")[1] == 0  # a Relu's result uses the whole grid


def test_tensorrt_gets_pairs_on_inputs_with_zero_points_of_zero() -> None:
    model = graph()
    insert(model, target="tensorrt")
    assert quantized(model) == ["a1", "d1", "r2", "x"]
    assert {scale(model, name)[1:] for name in quantized(model)} == {(0, "int8")}
    assert all(len(n.inputs) == 3 for n in model.nodes if n.op.endswith("eLinear"))
    assert reads(model, "s2") == ["p2", "r2_dq"]
    assert reads(model, "y") == ["s2"]


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_a_quantized_tensor_moves_by_at_most_half_a_step(target: str) -> None:
    model = graph()
    insert(model, target=target)
    (dq,) = (n.outputs[0] for n in model.nodes if n.name == "x_dq")
    model.outputs = [dq]
    step = scale(model, "x")[0]
    moved = np.abs(outputs(model)["x_dq"] - FEEDS["x"]).max()
    # x lies in its range. x/scale is rounded to float32: at most 2^8 * 2^-24 steps more.
    assert 0 < moved <= step * (0.5 + 2.0**-15)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.05), (16, 0.0002)])
def test_the_function_is_kept_but_for_rounding(bits: int, error: float) -> None:
    model = graph()
    before = outputs(model)["y"]
    insert(model, bits=bits)
    after = outputs(model)["y"]
    # Six roundings of at most half a step, 1/510 or 1/131070 of a range, each amplified by the
    # layers behind it: by less than 4 in norm for these weights.
    assert np.sqrt(np.square(after - before).mean() / np.square(before).mean()) < error


def test_sixteen_bits_need_opset_21() -> None:
    model = graph()
    insert(model, bits=16)
    assert model.opset == 21
    assert scale(model, "x")[2] == "uint16"
    assert scale(model, "a1")[1] == 0


def test_old_models_are_raised_to_opset_13() -> None:
    body = "a = Conv(x, p) b = Unsqueeze<axes = [0]>(a) e = Squeeze<axes = [0]>(b) y = Relu(e)"
    model = graph(body, opset=11)
    insert(model)
    assert model.opset == 13


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_moved_tensors_share_the_scale_of_their_origin(target: str) -> None:
    body = """a = Conv(x, p) b = Conv(a, q)
        e = MaxPool<kernel_shape = [3]>(a) f = Transpose<perm = [0, 1, 2]>(e) y = Conv(f, r)"""
    model = graph(body, "float[n, 4, s] y, float[n, 4, t] b")
    insert(model, target=target)
    assert scale(model, "f") == scale(model, "a")
    assert scale(model, "x") != scale(model, "a")


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_what_stays_float_is_named(target: str) -> None:
    ctx = insert(graph(), target=target, keep=("Conv_1",))
    assert ("Conv_1", "kept float by request") in ctx.skipped


def test_a_node_that_is_kept_reads_floats_where_there_are_any() -> None:
    model = graph()
    insert(model, keep=("Conv_4", "Conv_1"))
    assert reads(model, "r2") == ["x"]  # x exists in float; d1 does not
    assert reads(model, "p1") == ["d1_dq"]


@pytest.mark.parametrize("op", ["Sqrt", "Log"])
def test_amplifying_operators_read_floats(op: str) -> None:
    body = f"""e = Abs(x) f = Mul(e, e) z = {op}(f) y = Conv(f, p)"""
    model = graph(body, "float[n, 4, t] y, float[n, 4, t] z")
    insert(model)
    assert reads(model, "z") == ["f"]
    assert reads(model, "y_float") == ["f_dq"]


def test_other_readers_of_integers_read_the_pair() -> None:
    body = "a = Conv(x, p) e = Softmax(a) y = Conv(e, q) z = Exp(x)"
    model = graph(body, "float[n, 4, t] y, float[n, 4, t] z")
    insert(model)
    assert reads(model, "e") == ["a_dq"]
    assert reads(model, "z") == ["x"]


def test_an_output_that_is_read_too_keeps_its_name_and_value() -> None:
    model = graph("y = Conv(x, p) z = Conv(y, q)", "float[n, 4, t] y, float[n, 4, t] z")
    before = outputs(model)
    insert(model)
    after = outputs(model)
    assert list(after) == ["y", "z"]
    step = scale(model, "y")[0]
    # Of the range, 255 steps, the input's rounding moves y by less than 4 steps for these weights.
    np.testing.assert_allclose(after["y"], before["y"], atol=4 * step)


def test_a_tensor_read_twice_is_quantized_once() -> None:
    model = graph("a = Transpose<perm = [0, 2, 1]>(x) y = MatMul(x, a)", "float[n, 4, 4] y")
    insert(model)
    assert quantized(model) == ["a", "x", "y_float"]
    model = graph("a = Conv(x, p) y = Add(a, a)", "float[n, 4, t] y")
    insert(model)
    assert reads(model, "y_float") == ["a_dq", "a_dq"]
    assert quantized(model) == ["a", "x", "y_float"]


def test_bodies_read_the_pair_of_what_exists_as_integers() -> None:
    body = """a = Conv(x, p)
        y = If(flag) <
            then_branch = yes () => (float[n, 4, t] t) { t = Relu(a) },
            else_branch = no () => (float[n, 4, t] e) { e = Neg(x) }
        >"""
    model = graph(body, more=", bool flag")
    feeds = {**FEEDS, "flag": np.array(True)}
    ctx = Context(facts=set(FACTS), ranges=calibrate(model, [feeds], threads=1).select())
    before = outputs(model, flag=np.array(True))["y"]
    run(model, [InsertQdq()], ctx, [well_formed])
    (branch,) = (n.attrs["then_branch"] for n in model.nodes if n.op == "If")
    assert [t.name for t in branch.nodes[0].inputs] == ["a_dq"]
    after = outputs(model, flag=np.array(True))["y"]
    np.testing.assert_allclose(after, before, atol=4 * scale(model, "a")[0])


def test_names_that_are_taken_are_left_alone() -> None:
    body = """x_q = Relu(x) a_scale = Abs(x) a = Conv(x_q, p)
        y_float = Add(a, a_scale) y = Conv(y_float, q)"""
    model = graph(body)
    before = outputs(model)["y"]
    insert(model)
    assert np.abs(outputs(model)["y"] - before).max() < 0.2 * np.abs(before).max()


def test_a_missing_range_is_told() -> None:
    model = graph()
    ranges = dict(calibrate(model, [FEEDS], threads=1).select())
    del ranges["d1"]
    with pytest.raises(PassError, match="insert_qdq: tensor 'd1' has no range; expected one per"):
        run(model, [InsertQdq()], Context(facts=set(FACTS), ranges=ranges))
    assert not quantized(model)


def multiples(model: gs.Graph, total: str, *addends: str) -> list[float]:
    """The scales of tensors in 1023rds of that of their sum."""
    return [scale(model, name)[0] / scale(model, total)[0] * 1023 for name in addends]


def whole(numbers: list[float]) -> bool:
    return all(abs(n / round(n) - 1) < 2.0**-22 for n in numbers)


def test_addends_get_scales_that_integers_and_floats_agree_on() -> None:
    """Also across an activation; their zero points stay, and the sum's range."""
    model, before = graph(), graph()
    insert(model)
    ranges = calibrate(before, [FEEDS], threads=1).select()
    found = multiples(model, "y", "p2", "r2")
    assert whole(found)
    for name in ("p2", "r2"):
        raw, zero_point = affine(*ranges[name], Grid(8, signed=False))
        step, zero, _ = scale(model, name)
        assert zero == zero_point
        assert float(raw) <= step <= float(raw) * (1 + 1 / min(found))
    for name in ("x", "a1", "d1"):
        assert scale(model, name)[0] == affine(*ranges[name], Grid(8, signed=False))[0]


def test_an_addend_that_is_moved_takes_its_origin_along() -> None:
    body = "a = Conv(x, p) b = Conv(x, q) e = Transpose<perm = [0, 1, 2]>(a) y = Add(e, b)"
    model = graph(body)
    insert(model)
    assert scale(model, "e") == scale(model, "a")
    assert whole(multiples(model, "y", "a", "b"))


def test_of_two_sums_the_later_decides_and_its_addends_come_first() -> None:
    body = "a = Conv(x, p) b = Conv(x, q) s = Add(a, b) e = Conv(s, r) y = Add(s, e)"
    model = graph(body)
    insert(model)
    assert whole(multiples(model, "y", "s", "e"))
    assert whole(multiples(model, "s", "a", "b"))
    body = "a = Conv(x, p) b = Conv(x, q) s = Add(a, b) e = Conv(s, r) y = Add(a, e)"
    model = graph(body)
    insert(model)
    assert whole(multiples(model, "y", "a", "e"))
    assert whole(multiples(model, "s", "b"))
    assert not whole(multiples(model, "s", "a"))


def test_an_addend_far_smaller_than_its_sum_keeps_its_resolution() -> None:
    model = graph("a = Conv(x, p) e = Conv(a, t) y = Add(a, e)")
    ranges = calibrate(model, [FEEDS], threads=1).select()
    insert(model)
    assert whole(multiples(model, "y", "a"))
    assert scale(model, "e")[0] == affine(*ranges["e"], Grid(8, signed=False))[0]
    assert multiples(model, "y", "e")[0] < 16


def test_addends_keep_their_scales_where_the_sum_has_none() -> None:
    """The limit of Clip is computed, so that Clip is no part of the sum."""
    model = graph("a = Conv(x, p) b = Conv(x, q) s = Add(a, b) e = Relu(x) y = Clip(s, e)")
    ctx = Context(facts=set(FACTS), ranges=dict.fromkeys("xabsey", (-1.0, 2.0)))
    run(model, [InsertQdq()], ctx, [well_formed])
    assert quantized(model) == ["a", "b", "x", "y_float"]
    raw, _ = affine(-1.0, 2.0, Grid(8, signed=False))
    assert [scale(model, name)[0] for name in "ab"] == [raw, raw]


@pytest.mark.parametrize("options", [{"target": "tensorrt"}, {"bits": 16}, {"wide": ("Conv_0",)}])
def test_other_forms_keep_the_scales_of_addends(options: dict[str, Any]) -> None:
    model = graph("a = Conv(x, p) b = Conv(x, q) s = Add(a, b) y = Conv(s, r)")
    ranges = calibrate(model, [FEEDS], threads=1).select()
    insert(model, **options)
    grid = Grid(options.get("bits", 8), signed=options.get("target") == "tensorrt")
    widest = symmetric if grid.signed else affine
    addends = {"a", "b"} & set(quantized(model))
    assert addends
    for name in addends:
        assert scale(model, name)[0] == widest(*ranges[name], grid)[0]


def test_wrong_options_are_refused() -> None:
    ctx = Context(facts=set(FACTS))
    for options, message in (
        ({"bits": 4}, "4-bit activations; expected 8, or 16 but for tensorrt"),
        ({"bits": 16, "target": "tensorrt"}, "16-bit activations; expected 8, or 16 but for"),
        ({"target": "x"}, "unknown target 'x'; expected one of: ort, integer, tensorrt"),
    ):
        with pytest.raises(PassError, match=message):
            run(graph(), [InsertQdq(**options)], ctx)
    with pytest.raises(PassError, match="insert_qdq needs calibrated, which no earlier pass gives"):
        run(graph(), [InsertQdq()], Context(facts={"bn-folded"}))


def test_single_nodes_get_16_bits() -> None:
    model = graph()
    names = {n.outputs[0].name: n.name for n in model.nodes}
    insert(model, wide=(names["p1"],))
    widths = {
        n.inputs[0].name: np.dtype(n.outputs[0].dtype).name
        for n in model.nodes
        if n.op == "QuantizeLinear"
    }
    assert widths.pop("d1") == "uint16"
    assert set(widths.values()) == {"uint8"}
    assert model.opset == 21
    expected = Session(model_from_graph(graph())).run(FEEDS)["y"]
    got = Session(model_from_graph(model)).run(FEEDS)["y"]
    # Every tensor but d1 moves by half an 8-bit step; the sum of all stays within a tenth.
    assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max()


def test_tensorrt_has_no_16_bits_for_single_nodes() -> None:
    model = graph()
    ctx = Context(facts=set(FACTS), ranges=calibrate(model, [FEEDS], threads=1).select())
    with pytest.raises(PassError, match="16-bit activations"):
        run(model, parse("insert_qdq(target='tensorrt', wide=('*',))"), ctx)


def test_what_was_made_since_calibration_has_the_range_of_where_it_moves() -> None:
    body = """t1 = Transpose<perm = [0, 2, 1]>(x)
        a = MatMul(t1, m)
        h = Transpose<perm = [1, 0, 2]>(a)
        y = MatMul(h, m)"""
    scales = []
    ranges = calibrate(graph(body, "float[s, n, 4] y"), [FEEDS], threads=1).select()
    for name in ("", "a"):
        model = graph(body, "float[s, n, 4] y")
        known = {n: limits for n, limits in ranges.items() if n != name}
        run(model, [InsertQdq()], Context(facts=set(FACTS), ranges=known), [well_formed])
        quantizers = [n for n in model.nodes if n.op == "QuantizeLinear"]
        scales.append([constant(n, 1) for n in quantizers if n.inputs[0].name in {"a", "h"}])
    assert scales[0] == scales[1]
    lost = Context(facts=set(FACTS), ranges={"x": ranges["x"], "t1": ranges["t1"]})
    with pytest.raises(PassError, match="tensor 'a' has no range"):
        run(graph(body, "float[s, n, 4] y"), [InsertQdq()], lost)
