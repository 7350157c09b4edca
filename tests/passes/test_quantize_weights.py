import json
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.calibrate import calibrate
from onnx_intq.codebook import CodedWeight
from onnx_intq.cost import cost
from onnx_intq.graph import constant, graph_from_model, metadata, model_from_graph
from onnx_intq.grid import weight_grid, weight_scales
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, PassError, run
from onnx_intq.verify import well_formed

QuantizeWeights = load("quantize_weights")
law = settings(derandomize=True, deadline=None, max_examples=25)
BITS = "onnx_intq.bits"
X = np.random.default_rng(1).standard_normal((2, 4, 6)).astype(np.float32)


def graph(
    body: str, weights: dict[str, Any], y: str = "[n, m, s]", x: str = "[n, 4, t]"
) -> gs.Graph:
    text = (
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float{x} x) => (float{y} y) {{ {body} }}"""
    )
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for name, value in weights.items():
        values = random.standard_normal(value) if isinstance(value, tuple) else value
        tensor = onnx.numpy_helper.from_array(np.asarray(values, np.float32), name)
        model.graph.initializer.append(tensor)
    return graph_from_model(model)


def quantize(model: gs.Graph, x: np.ndarray = X, target: str = "tensorrt", **options: Any) -> int:
    """Quantize activations and weights; quantizing weights again must change nothing."""
    ctx = Context({"bn-folded", "calibrated"}, calibrate(model, [{"x": x}], threads=1).select())
    spec = QuantizeWeights(**options)
    (insert,) = parse(f"insert_qdq(target={target!r})")
    _, first, second = run(model, [insert, spec, spec], ctx, [well_formed])
    assert second.changes == 0
    return first.changes


def stored(model: gs.Graph) -> dict[str, gs.Node]:
    """Name of the stored integers -> the node that dequantizes them."""
    nodes = [n for n in model.nodes if n.op == "DequantizeLinear"]
    return {n.inputs[0].name: n for n in nodes if constant(n, 0) is not None}


def integers(model: gs.Graph, name: str) -> Any:
    return stored(model)[name].inputs[0].values


def real(node: gs.Node) -> Any:
    """What a node that dequantizes a weight gives."""
    q, scales, zeros = (t.values for t in node.inputs)
    assert q.dtype == zeros.dtype == np.int8
    assert not zeros.any()
    assert zeros.shape == scales.shape
    axis = node.attrs.get("axis")
    shape = [-1 if i == axis else 1 for i in range(q.ndim)]
    return q * (scales if axis is None else scales.reshape(shape))


@pytest.mark.parametrize(
    ("body", "weights", "axis", "x", "y"),
    [
        ("y = Conv(x, w)", {"w": (6, 4, 3)}, 0, "[n, 4, t]", "[n, 6, s]"),
        ("y = Conv<group = 2>(x, w)", {"w": (6, 2, 3)}, 0, "[n, 4, t]", "[n, 6, s]"),
        ("y = ConvTranspose(x, w)", {"w": (4, 5, 3)}, 1, "[n, 4, t]", "[n, 5, s]"),
        ("y = ConvTranspose<group = 2>(x, w)", {"w": (4, 3, 3)}, None, "[n, 4, t]", "[n, 6, s]"),
        ("y = MatMul(x, w)", {"w": (6, 5)}, 1, "[n, 4, 6]", "[n, 4, 5]"),
        ("y = MatMul(x, w)", {"w": (2, 6, 5)}, None, "[2, 4, 6]", "[2, 4, 5]"),
        ("y = MatMul(w, x)", {"w": (5, 4)}, None, "[n, 4, 6]", "[n, 5, 6]"),
        ("a = Flatten(x) y = Gemm(a, w)", {"w": (24, 5)}, 1, "[n, 4, 6]", "[n, 5]"),
        ("a = Flatten(x) y = Gemm<transB = 1>(a, w)", {"w": (5, 24)}, 0, "[n, 4, 6]", "[n, 5]"),
    ],
)
def test_scales_lie_along_the_output_channels(
    body: str, weights: dict[str, Any], axis: int | None, x: str, y: str
) -> None:
    model = graph(body, weights, y, x)
    before = Session(model_from_graph(model), threads=1).run({"x": X})["y"]
    w = model.tensors()["w"].values
    assert quantize(model) == 1
    (node,) = stored(model).values()
    assert node.attrs.get("axis") == axis
    assert node.inputs[1].shape == (() if axis is None else (w.shape[axis],))
    steps = node.inputs[1].values.reshape([-1 if i == axis else 1 for i in range(w.ndim)])
    # mse cuts off at most a few of the largest weights, here by less than ten steps.
    assert (np.abs(real(node) - w) <= 10 * steps).all()
    after = Session(model_from_graph(model), threads=1).run({"x": X})["y"]
    # 8 bits: 1/254 of a range of some six standard deviations, on activations and weights.
    assert np.square(after - before).mean() < 2 * (6 / 254) ** 2 * np.square(before).mean()


@law
@given(st.integers(2, 8), st.sampled_from(["mse", "minmax"]), st.integers(0, 5))
def test_every_width_keeps_to_its_grid(bits: int, scale: str, seed: int) -> None:
    w = np.random.default_rng(seed).standard_normal((6, 4, 3))
    model = graph("y = Conv(x, w)", {"w": w})
    quantize(model, bits=bits, scale=scale)
    q, grid = integers(model, "w_q"), weight_grid(bits)
    assert q.dtype == np.int8
    assert grid.low <= q.min()
    assert q.max() <= grid.high
    if scale == "minmax":
        assert (np.abs(q).max(axis=(1, 2)) == grid.high).all()


def test_seven_bits_give_the_same_result_with_and_without_saturation() -> None:
    """On processors whose u8 x s8 sums saturate, two products of the largest values must fit."""
    model = graph("y = Conv(x, w)", {"w": (64, 64, 3)}, x="[n, 64, t]")
    quantize(model, x=np.ones((1, 64, 6), np.float32), bits=7)
    assert 2 * 255 * int(np.abs(integers(model, "w_q")).max()) <= np.iinfo(np.int16).max


def divisors(model: gs.Graph, alpha: float = 1.0) -> list[float]:
    """Result scale / (input scale x weight scale), times the power of two that makes it >= 129."""
    quantizers = [n for n in model.nodes if n.op == "QuantizeLinear"]
    x, y = (float(n.inputs[1].values) for n in quantizers)
    (node,) = stored(model).values()
    ratios = y / (x * abs(alpha) * np.ravel(node.inputs[1].values.astype(np.float64)))
    return [float(r * 2.0 ** max(0, np.ceil(np.log2(128.5 / r)))) for r in ratios]


@pytest.mark.parametrize(
    ("body", "weights", "alpha"),
    [
        ("y = Conv(x, w)", {"w": (6, 4, 3)}, 1.0),
        ("a = Conv(x, w, b) y = Relu(a)", {"w": (6, 4, 3), "b": (6,)}, 1.0),
        ("a = Conv(x, w, b) y = Clip(a, l, h)", {"w": (6, 4, 3), "b": (6,), "l": -1, "h": 1}, 1.0),
        ("a = MatMul(x, w) c = Add(a, b) y = Relu(c)", {"w": (6, 5), "b": (5,)}, 1.0),
        ("y = MatMul(w, x)", {"w": (5, 4)}, 1.0),
        ("a = Flatten(x) y = Gemm<alpha = 0.3>(a, w)", {"w": (24, 5)}, 0.3),
        ("a = Flatten(x) y = Gemm<alpha = -2.0, transB = 1>(a, w)", {"w": (5, 24)}, -2.0),
    ],
)
@pytest.mark.parametrize("scale", ["mse", "minmax"])
def test_scales_are_moved_to_where_floats_and_integers_agree(
    body: str, weights: dict[str, Any], alpha: float, scale: str
) -> None:
    """Next to an odd number of 2^-j: by less than 2 %, and never below the largest weight."""
    y = "[n, 5]" if "Gemm" in body else "[n, m, s]"
    model = graph(body, weights, y, "[n, 4, 6]")
    w = model.tensors()["w"].values
    assert quantize(model, target="ort", scale=scale) == 1
    (node,) = stored(model).values()
    before, after = weight_scales(w, node.attrs.get("axis"), 8, scale), node.inputs[1].values
    assert after.dtype == np.float32
    assert after.shape == before.shape
    assert (np.abs(after / before - 1) < 0.02).all()
    assert (after >= before).all() or scale == "mse"
    for divisor in divisors(model, alpha):
        assert round(divisor) % 2 == 1
        assert abs(divisor / round(divisor) - 1) < 2.0**-22


def test_scales_stay_where_the_result_is_float() -> None:
    model = graph("y = Conv(x, w)", {"w": (6, 4, 3)})
    w = model.tensors()["w"].values
    assert quantize(model, target="tensorrt") == 1
    (node,) = stored(model).values()
    np.testing.assert_array_equal(node.inputs[1].values, weight_scales(w, 0, 8))


def test_a_smaller_error_is_the_reason_for_mse() -> None:
    errors = {}
    for scale in ("mse", "minmax"):
        model = graph("y = Conv(x, w)", {"w": (6, 4, 50)}, x="[n, 4, 60]")
        w = model.tensors()["w"].values
        quantize(model, x=np.ones((1, 4, 60), np.float32), bits=4, scale=scale)
        errors[scale] = np.square(real(stored(model)["w_q"]) - w).sum(axis=(1, 2))
    assert (errors["mse"] < errors["minmax"]).all()


def test_widths_are_recorded_for_the_stored_tensors() -> None:
    body = "a = Conv(x, w) b = Conv(a, v) c = Conv(b, u) y = Conv(c, t)"
    model = graph(body, dict.fromkeys("wvut", (4, 4, 1)))
    overrides = (("*", 6), ("Conv_[12]", 4), ("Conv_2", 8))
    assert quantize(model, bits=3, overrides=overrides) == 4
    assert json.loads(metadata(model)[BITS]) == {"t_q": 6, "v_q": 4, "w_q": 6}
    assert set(stored(model)) == {"t_q", "u_q", "v_q", "w_q"}
    costs = {node.name: node.bits for node in cost(model).nodes}
    assert costs == {"Conv_0": (8, 6), "Conv_1": (8, 4), "Conv_2": (8, 8), "Conv_3": (8, 6)}


def test_eight_bits_are_not_worth_a_record() -> None:
    model = graph("y = Conv(x, w)", {"w": (4, 4, 1)})
    quantize(model)
    assert BITS not in metadata(model)


def test_a_shared_weight_is_quantized_once() -> None:
    model = graph("a = Conv(x, w) y = Conv(a, w)", {"w": (4, 4, 1)})
    assert quantize(model) == 1
    (node,) = stored(model).values()
    assert len(node.outputs[0].outputs) == 2


def test_a_shared_weight_of_two_widths_is_stored_twice() -> None:
    model = graph("a = Conv(x, w) y = Conv(a, w)", {"w": (4, 4, 1)})
    assert quantize(model, overrides=(("Conv_1", 2),)) == 2
    assert json.loads(metadata(model)[BITS]) == {"w_q_": 2}
    assert set(np.unique(integers(model, "w_q_"))) <= {-1, 0, 1}


def test_a_shared_weight_read_along_two_axes_is_stored_twice() -> None:
    body = "a = Gemm(x, w) y = Gemm<transB = 1>(a, w)"
    model = graph(body, {"w": (4, 4)}, "[n, 4]", "[n, 4]")
    assert quantize(model, x=X[0].T.copy()) == 2
    assert [node.attrs["axis"] for node in stored(model).values()] == [1, 0]


def test_names_that_are_taken_are_left_alone() -> None:
    model = graph(
        "a = Conv(x, w) b = Mul(a, w_scale) y = Add(b, w_q)",
        {"w": (4, 4, 1), "w_scale": (1,), "w_q": (1,)},
    )
    assert quantize(model) == 1
    assert set(stored(model)) == {"w_q_"}


def test_weights_of_float_operators_stay() -> None:
    model = graph("a = Abs(x) b = Conv(a, w) y = Log(b)", {"w": np.ones((4, 4, 1))})
    assert quantize(model) == 0


def test_computed_weights_stay() -> None:
    model = graph("a = Transpose<perm = [0, 2, 1]>(x) y = MatMul(x, a)", {}, "[n, 4, 4]")
    assert quantize(model) == 0


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_biases_of_dead_channels_fit_into_int32(target: str) -> None:
    w = np.random.default_rng(0).standard_normal((3, 4, 1))
    w[1], w[2] = 0, 1e-20
    model = graph("y = Conv(x, w, b)", {"w": w, "b": [1, -300, 2]})
    before = Session(model_from_graph(model), threads=1).run({"x": X})["y"]
    quantize(model, target=target)
    (x_scale,) = (
        n.inputs[1].values
        for n in model.nodes
        if n.op == "QuantizeLinear" and n.inputs[0].name == "x"
    )
    steps = np.array([1, 300, 2]) / (
        stored(model)["w_q"].inputs[1].values.astype(np.float64) * x_scale
    )
    np.testing.assert_allclose(steps[1:], 1 << 30, rtol=2.0**-20)
    assert steps[0] < 1 << 20
    after = Session(model_from_graph(model), threads=1).run({"x": X})["y"]
    # The output's grid has 255 steps of 302/255.
    np.testing.assert_allclose(after[:, 1:], before[:, 1:], atol=0.6 * 302 / 255)


def test_a_shared_weight_gets_the_floor_of_all_its_biases() -> None:
    w = np.full((4, 4, 1), 1e-12)
    model = graph("a = Conv(x, w, b) y = Conv(a, w, c)", {"w": w, "b": [1e-3] * 4, "c": [1e6] * 4})
    quantize(model)
    scales = {n.inputs[0].name: n.inputs[1].values for n in model.nodes if n.op == "QuantizeLinear"}
    steps = 1e6 / (scales["a"] * stored(model)["w_q"].inputs[1].values.astype(np.float64))
    assert (steps <= (1 << 30) * (1 + 2.0**-20)).all()


def test_the_floor_holds_for_one_scale_and_for_scaled_biases() -> None:
    body = "a = Flatten(x) y = Gemm<alpha = 0.5, beta = 4.0>(a, w, b)"
    model = graph(body, {"w": np.full((24, 2), 1e-15), "b": [1, 100]}, "[n, 2]", "[n, 4, 6]")
    quantize(model)
    (x_scale,) = (n.inputs[1].values for n in model.nodes if n.op == "QuantizeLinear")
    steps = (
        np.array([1, 100])
        * 4
        / (0.5 * x_scale * stored(model)["w_q"].inputs[1].values.astype(np.float64))
    )
    assert (steps <= (1 << 30) * (1 + 2.0**-20)).all()
    model = graph(
        "y = ConvTranspose<group = 2>(x, w, b)", {"w": np.full((4, 1, 3), 1e-15), "b": [1, 100]}
    )
    quantize(model)
    (x_scale,) = (n.inputs[1].values for n in model.nodes if n.op == "QuantizeLinear")
    assert 100 / (float(x_scale) * float(stored(model)["w_q"].inputs[1].values)) <= (1 << 30) * (
        1 + 2.0**-20
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    model = graph("a = Relu(x) y = Conv(a, w)", {"w": np.full((4, 4, 1), bad)})
    ctx = Context({"bn-folded", "calibrated"}, {"a": (0.0, 1.0), "y": (0.0, 1.0)})
    with pytest.raises(
        PassError, match="quantize_weights: weight 'w' holds NaN or infinity; expected"
    ):
        run(model, [*parse("insert_qdq"), QuantizeWeights()], ctx)


def test_wrong_options_are_refused() -> None:
    ctx = Context({"quantized"})
    for options, message in (
        ({"bits": 1}, "1-bit weights; expected 2..8"),
        ({"bits": 9}, "9-bit weights; expected 2..8"),
        ({"overrides": (("*", 16),)}, "16-bit weights; expected 2..8"),
        ({"scale": "max"}, "weight scale 'max'; expected 'mse' or 'minmax'"),
    ):
        with pytest.raises(PassError, match=f"quantize_weights: {message}"):
            run(graph("y = Conv(x, w)", {"w": (4, 4, 1)}), [QuantizeWeights(**options)], ctx)
    with pytest.raises(PassError, match="quantize_weights needs quantized, which no earlier pass"):
        run(graph("y = Conv(x, w)", {"w": (4, 4, 1)}), [QuantizeWeights()], Context())


@pytest.mark.parametrize("scales", [np.full(3, 0.1, np.float32), np.float32(0.1)])
def test_a_weight_is_stored_as_it_came(scales: Any) -> None:
    integers_given = np.array([[-90, 7], [7, 64], [64, -90]], np.int8)
    axis = 0 if np.ndim(scales) else None
    coded = CodedWeight(stored=integers_given, scales=np.asarray(scales), axis=axis, bits=2)
    for bias, same in ((1.0, True), (3e9, False)):
        model = graph(
            "c = Gemm<transB = 1>(x, w, b)  y = Relu(c)",
            {"w": coded.dequantized(), "b": np.array([0, bias, 0])},
            "[n, 3]",
            "[n, 2]",
        )
        x = np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32)
        ctx = Context({"bn-folded", "calibrated"}, calibrate(model, [{"x": x}], threads=1).select())
        ctx.coded = {(model.nodes[0].name, 1): coded}
        run(model, parse("insert_qdq(target='ort'), quantize_weights"), ctx, [well_formed])
        (node,) = stored(model).values()
        kept, wanted = node.inputs[0].values, node.inputs[1].values
        assert set(np.unique(kept)) <= {-90, 7, 64}
        assert json.loads(metadata(model)[BITS]) == {node.inputs[0].name: 2}
        assert wanted.shape == np.shape(scales)
        unchanged = [0, 2] if axis == 0 else []
        rows = slice(None) if same else unchanged
        assert np.array_equal(kept[rows], integers_given[rows])
        if same:
            assert np.array_equal(wanted, scales)
        else:
            assert wanted.max() > 0.1


def test_a_weight_that_has_changed_is_quantized_anew() -> None:
    coded = CodedWeight(
        stored=np.array([[1, 2], [3, 4], [5, 6]], np.int8),
        scales=np.ones(3, np.float32),
        axis=0,
        bits=2,
    )
    model = graph("y = Gemm<transB = 1>(x, w)", {"w": (3, 2)}, "[n, 3]", "[n, 2]")
    x = np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32)
    ctx = Context({"bn-folded", "calibrated"}, calibrate(model, [{"x": x}], threads=1).select())
    ctx.coded = {(model.nodes[0].name, 1): coded}
    run(model, parse("insert_qdq(target='ort'), quantize_weights(bits=8)"), ctx, [well_formed])
    assert BITS not in metadata(model)
