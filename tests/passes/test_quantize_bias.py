from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import constant, graph_from_model, model_from_graph
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, PassError, run
from onnx_intq.verify import well_formed

QuantizeBias = load("quantize_bias")
X = np.random.default_rng(1).standard_normal((2, 4, 6)).astype(np.float32)
VALUES = {"sx": np.float32(0.02), "zx": np.uint8(128), "s": np.float32(0.05), "zero": np.int8(0)}
SCALES = np.array([0.01, 0.02, 0.03], np.float32)


def graph(
    operator: str,
    weights: Any,
    bias: Any,
    scales: Any = SCALES,
    axis: int = 0,
    y: str = "[n, 3, t]",
) -> gs.Graph:
    """`operator` on x, quantized, weights w and a float bias c."""
    scales = np.asarray(scales, np.float32)
    attribute = f"<axis = {axis}>" if scales.ndim else ""
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[n, 4, t] x) => (float{y} y) {{
        q = QuantizeLinear(x, sx, zx)
        a = DequantizeLinear(q, sx, zx)
        f = Flatten(x)
        r = QuantizeLinear(f, sx, zx)
        b = DequantizeLinear(r, sx, zx)
        w = DequantizeLinear{attribute}(wq, sw, zw)
        y = {operator}
    }}"""
    model = onnx.parser.parse_model(text)
    wq = np.random.default_rng(0).integers(-127, 128, weights).astype(np.int8)
    values = {"wq": wq, "sw": scales, "zw": np.zeros(scales.shape, np.int8)}
    values["c"] = np.asarray(bias, np.float32)
    for name, value in {**VALUES, **values}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return graph_from_model(model)


def quantize(model: gs.Graph) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Quantize; doing so again must change nothing."""
    first, second = run(model, [QuantizeBias()] * 2, Context({"quantized"}), [well_formed])
    assert second.changes == 0
    return first.changes, first.skipped


def bias_of(model: gs.Graph) -> gs.Node:
    node = next(n for n in model.nodes if n.outputs[0].name == "y")
    return node.inputs[2].inputs[0]


def output(model: gs.Graph) -> Any:
    return Session(model_from_graph(model), threads=1, optimize=False).run({"x": X})["y"]


@pytest.mark.parametrize(
    ("operator", "weights", "scales", "axis", "y"),
    [
        ("Conv(a, w, c)", (3, 4, 1), SCALES, 0, "[n, 3, t]"),
        ("Conv(a, w, c)", (3, 4, 1), 0.01, 0, "[n, 3, t]"),
        ("ConvTranspose(a, w, c)", (4, 3, 1), SCALES, 1, "[n, 3, t]"),
        ("Gemm(b, w, c)", (24, 3), SCALES, 1, "[n, 3]"),
        ("Gemm<alpha = 0.5, transB = 1>(b, w, c)", (3, 24), SCALES, 0, "[n, 3]"),
    ],
)
def test_a_bias_moves_by_at_most_half_a_step(
    operator: str, weights: tuple[int, ...], scales: Any, axis: int, y: str
) -> None:
    bias = np.array([1.5, -2.25, 0.001], np.float32)
    model = graph(operator, weights, bias, scales, axis, y)
    before = output(model)
    assert quantize(model) == (1, ())
    node = bias_of(model)
    q, step = constant(node, 0), constant(node, 1)
    assert (node.op, node.attrs["axis"]) == ("DequantizeLinear", 0)
    assert q is not None
    assert step is not None
    assert q.dtype == np.int32
    assert step.shape == (3,)
    alpha = 0.5 if "alpha" in operator else 1.0
    np.testing.assert_allclose(step, np.float32(0.02) * np.asarray(scales) * alpha, rtol=1e-6)
    assert (np.abs(q * step - bias) <= step * (0.5 + 1e-6)).all()
    moved = np.abs(output(model) - before).max()
    # The bias's half step, and the rounding of sums of up to 24 products below 40 in float32.
    assert moved <= 0.5 * float(step.max()) + 40 * 24 * 2.0**-24


@pytest.mark.parametrize(
    ("operator", "weights", "bias", "why"),
    [
        ("Gemm(b, w, c)", (24, 3), [[1, 2, 3]], "its bias is no plain vector and stays float"),
        ("Gemm(b, w, c)", (24, 3), [1], "its bias is no plain vector and stays float"),
        ("Gemm<beta = 2.0>(b, w, c)", (24, 3), [1, 2, 3], "its bias is no plain vector and stays"),
        ("Gemm<alpha = -1.0>(b, w, c)", (24, 3), [1, 2, 3], "its scales are not positive, and its"),
        ("Gemm(b, w, c)", (24, 3), [1, 1e7, 3], "its bias does not fit into int32 and stays float"),
    ],
)
def test_declines(operator: str, weights: tuple[int, ...], bias: Any, why: str) -> None:
    model = graph(operator, weights, bias, axis=1, y="[n, 3]")
    changes, ((name, reason),) = quantize(model)
    assert (changes, name) == (0, "Gemm_6")
    assert why in reason
    assert constant(model.nodes[-1], 2) is not None


def test_scales_computed_at_run_time_are_declined() -> None:
    model = graph("Conv(a, w, c)", (3, 4, 1), [1, 2, 3])
    model.nodes[1].inputs[1] = gs.Variable("s2", np.float32, [])
    model.inputs.append(model.nodes[1].inputs[1])
    assert quantize(model) == (
        0,
        (("Conv_6", "its scales are computed at run time, and its bias stays float"),),
    )


def test_operators_without_a_bias_or_quantized_inputs_are_left_alone() -> None:
    for operator in ("Conv(a, w)", "Conv(x, w, c)", "Conv(a, k, c)"):
        model = graph(operator.replace("k", "w"), (3, 4, 1), [1, 2, 3])
        if "k" in operator:
            model.nodes[-1].inputs[1] = gs.Constant("k", np.ones((3, 4, 1), np.float32))
        assert quantize(model) == (0, ())


def test_pairs_must_have_been_inserted() -> None:
    with pytest.raises(
        PassError, match="quantize_bias needs quantized, which no earlier pass gives"
    ):
        run(graph("Conv(a, w, c)", (3, 4, 1), [1, 2, 3]), [QuantizeBias()], Context())
