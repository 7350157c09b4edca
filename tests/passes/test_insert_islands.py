from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq import qdq
from onnx_intq.calibrate import calibrate
from onnx_intq.composites import arguments
from onnx_intq.graph import constant, graph_from_model, model_from_graph
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

InsertIslands: Any = load("insert_islands")
PRODUCTS = parse("insert_qdq(target='tensorrt')")
FEEDS = {"x": np.random.default_rng(1).standard_normal((2, 4, 12)).astype(np.float32)}
SHAPES: dict[str, Any] = {
    "w": (4, 4, 1),
    "v": (4, 4, 1),
    "u": (8, 4, 1),
    "m": (12, 12),
    "b": 12,
    "g": 12,
}
HALVES = "l, r = Split<axis = 1, num_outputs = 2>(c)"
COARSE = "8 bits are too coarse for what it reads, and TensorRT takes no 16-bit Q/DQ"
IN_FLOAT = "its result is read in float"
FROM_FLOAT = "its input is made by an operator that stays float"


def graph(body: str, opset: int = 20) -> gs.Graph:
    """The nodes `body` make f of x; a quantized convolution reads it."""
    text = f"""<ir_version: 9, opset_import: ["" : {opset}]>
        net (float[n, 4, 12] x) => (float[n, 4, 12] y) {{ {body} y = Conv(f, v) }}"""
    model, random = onnx.parser.parse_model(text), np.random.default_rng(0)
    constants: dict[str, Any] = {name: random.standard_normal(s) for name, s in SHAPES.items()}
    constants |= {"low": np.float32(0.2), "high": np.float32(1), "k": np.float32(3)}
    for name, values in constants.items():
        tensor = onnx.numpy_helper.from_array(np.asarray(values, np.float32), name)
        model.graph.initializer.append(tensor)
    return graph_from_model(model)


def insert(model: gs.Graph, without: str = "", **options: Any) -> tuple[int, list[tuple[str, str]]]:
    """Quantize products and insert; doing so again must change nothing. Changes; what is left."""
    ctx = Context(facts={"bn-folded", "calibrated"})
    ranges = calibrate(model, [FEEDS], threads=1).select(symmetric=True)
    ctx.ranges = {name: limits for name, limits in ranges.items() if name != without}
    spec = InsertIslands(**options)
    _, first, second = run(model, [*PRODUCTS, spec, spec], ctx, [well_formed])
    assert second.changes == 0
    assert second.skipped == first.skipped
    assert ctx.facts == {"bn-folded", "calibrated", "quantized", "complete"}
    return first.changes, list(first.skipped)


ISLANDS = {
    "c = Conv(x, w) f = Sigmoid(c)": ["c"],
    "c = Conv(x, w) f = HardSwish(c)": ["c"],
    "c = Conv(x, w) s = Tanh(c) f = Clip(s, low, high)": ["c"],
    "c = Conv(x, w) r = Relu(c) f = Gelu(r)": ["r"],
    "c = Conv(x, w) s = Sigmoid(c) f = Mul(c, s)": ["c"],
    "c = Conv(x, w) s = Sigmoid(c) f = Mul(s, c)": ["c"],
    f"c = Conv(x, u) {HALVES} s = Sigmoid(r) f = Mul(l, s)": ["l", "r"],
    "c = Conv(x, w) e = Conv(x, v) a = Add(c, e) f = Tanh(a)": ["a"],
    "c = MatMul(x, m) d = Add(c, b) e = Erf(d) f = MatMul(e, m)": ["d"],
    "c = Conv(x, w) d = Sigmoid(c) e = Conv(d, v) a = Tanh(e) f = Conv(a, v)": ["c", "e"],
}


@pytest.mark.parametrize("body", ISLANDS)
def test_what_a_function_between_products_reads_is_quantized(body: str) -> None:
    model = graph(body)
    ranges = calibrate(model, [FEEDS], threads=1).select(symmetric=True)
    before = [node.op for node in model.nodes]
    count, left = insert(model)
    assert (count, left) == (body.count("Sigmoid") + body.count("Tanh") or 1, [])
    assert [node.op for node in model.nodes if node.op not in qdq.QDQ] == before
    functions = [n for n in model.nodes if n.op in InsertIslands.operators - {"Sigmoid"}]
    functions += [n for n in model.nodes if n.op == "Sigmoid" and "Mul" not in before]
    found = {q.inputs[0].name: q for n in functions for t in arguments(n) if (q := qdq.pair(t))}
    assert sorted(found) == ISLANDS[body]
    for name, quantizer in found.items():
        zero_point, scale = constant(quantizer, 2), constant(quantizer, 1)
        assert zero_point is not None
        assert (zero_point.dtype.name, zero_point.tolist()) == ("int8", 0)
        assert scale == pytest.approx(max(map(abs, ranges[name])) / 127)


LEFT = {
    "c = Conv(x, w) s = Sigmoid(c) f = Mul(s, k)": ("Sigmoid_1", IN_FLOAT),
    "c = Conv(x, w) s = Sigmoid(c) p = Mul(c, s) f = Mul(p, k)": ("Mul_2", IN_FLOAT),
    "c = Conv(x, w) s = Sigmoid(c) f = Add(c, s)": ("Sigmoid_1", IN_FLOAT),
    "c = Conv(x, w) s = Tanh(c) e = Conv(s, v) n = Neg(s) f = Add(e, n)": ("Tanh_1", IN_FLOAT),
    "f = Tanh(x)": ("Tanh_0", FROM_FLOAT),
    "c = Conv(x, w) d = Mul(c, k) f = Tanh(d)": ("Tanh_2", FROM_FLOAT),
    "c = Conv(x, w) s = Sigmoid(c) f = Mul(x, s)": ("Mul_2", FROM_FLOAT),
    "c = MatMul(x, m) f = Softmax(c)": ("Softmax_1", COARSE),
    "c = MatMul(x, m) f = LayerNormalization(c, g, b)": ("LayerNormalization_1", COARSE),
}


@pytest.mark.parametrize("body", LEFT)
def test_what_stays_float_is_named(body: str) -> None:
    model = graph(body)
    assert insert(model) == (0, [LEFT[body]])


def test_a_function_stays_float_by_request_or_without_a_range() -> None:
    body = "c = Conv(x, w) f = Tanh(c)"
    assert insert(graph(body), keep=("Tan*",)) == (0, [("Tanh_1", "kept float by request")])
    assert insert(graph(body), without="c") == (0, [("Tanh_1", "its input has no range")])


@pytest.mark.parametrize("end", ["y = Sigmoid(f)", "s = Softmax(f) y = Reshape(s, shape)"])
def test_the_graphs_outputs_stay_float_without_a_word(end: str) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> net (float[n, 4, 12] x) => (float[k, 4, 12] y)
        <int64[3] shape = {{-1, 4, 12}}> {{ f = Conv(x, w) {end} }}"""
    )
    w = onnx.numpy_helper.from_array(np.ones((4, 4, 1), np.float32), "w")
    model.graph.initializer.append(w)
    assert insert(graph_from_model(model)) == (0, [])


def test_a_pair_that_is_there_is_read() -> None:
    model = graph("c = Conv(x, w) d = Conv(c, v) s = Sigmoid(c) e = Conv(s, v) f = Add(d, e)")
    assert insert(model) == (1, [])
    quantizers = [node for node in model.nodes if node.op == qdq.QUANTIZE]
    assert [q.inputs[0].name for q in quantizers].count("c") == 1


def test_rows_are_quantized_where_asked_for() -> None:
    model = graph("c = MatMul(x, m) d = Softmax(c) f = MatMul(d, m)", opset=17)
    assert insert(model, rows=True) == (1, [])
    assert model.opset == 18
    model = graph("d = LayerNormalization(x, g, b) f = MatMul(d, m)", opset=17)
    assert insert(model, rows=True) == (1, [])
    (norm,) = (node for node in model.nodes if node.op == "LayerNormalization")
    found = qdq.pair(norm.inputs[0])
    assert found is not None
    assert found.inputs[0].name == "x"


def test_a_tensor_moves_by_half_a_step_at_most() -> None:
    body = "c = Conv(x, w) s = Sigmoid(c) f = Mul(c, s)"
    model, reference = graph(body), graph(body)
    ranges = calibrate(model, [FEEDS], threads=1).select(symmetric=True)
    insert(model)
    found = next(n for n in model.nodes if n.op == "Sigmoid").inputs[0]
    for each, tensor in ((model, found), (reference, reference.tensors()["c"])):
        tensor.dtype, each.outputs = np.float32, [tensor]
    moved, exact = (
        next(iter(Session(model_from_graph(g), threads=1).run(FEEDS).values()))
        for g in (model, reference)
    )
    weights = reference.nodes[0].inputs[1].values
    steps = {name: max(map(abs, ranges[name])) / 127 for name in "xc"}
    # The convolution reads x rounded, too.
    error = steps["c"] / 2 + steps["x"] / 2 * np.abs(weights).sum(axis=(1, 2)).max()
    assert 0 < np.abs(moved - exact).max() <= error + 1e-6
    np.testing.assert_allclose(moved / steps["c"], np.rint(moved / steps["c"]), atol=1e-4)
