from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.calibrate import calibrate
from onnx_intq.graph import constant, graph_from_model, model_from_graph
from onnx_intq.placement import is_bias
from onnx_intq.reference import layers, original_totals, sequential, totals
from onnx_intq.registry import parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, IntqError, run
from onnx_intq.verify import well_formed

BODY = """a = Conv<pads = [1, 1]>(x, w1)
    r = Relu(a)
    d = Conv<group = 6>(r, w2, b2)
    t = Transpose<perm = [0, 2, 1]>(d)
    m = MatMul(t, w3)
    s = Relu(m)
    n = MatMul(s, w4)
    z = Add(n, b4)
    q = Reshape(z, shape)
    y = Gemm<beta = 0.5>(q, w5, b5)"""
SHAPES: dict[str, Any] = {
    "w1": (6, 4, 3), "w2": (6, 1, 1), "b2": (6,), "w3": (6, 5), "w4": (5, 3), "b4": (3,),
    "w5": (3, 2), "b5": (1, 2),
}  # fmt: skip


def quantized(body: str = BODY, bits: int = 4) -> tuple[gs.Graph, Context]:
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4, 10] x) => (float[k, 2] y)
        <int64[2] shape = {{-1, 3}}> {{ {body} }}"""
    )
    for name, shape in SHAPES.items():
        if name in body:
            values = random.standard_normal(shape).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    graph = graph_from_model(model)
    feeds = [{"x": random.standard_normal((4, 4, 10)).astype(np.float32)} for _ in range(4)]
    ctx = Context(facts={"bn-folded", "data"}, feeds=feeds)
    ctx.ranges = calibrate(graph, feeds).select("minmax")
    ctx.reference = graph.copy()
    ctx.facts |= {"calibrated", "reference"}
    run(graph, parse(f"insert_qdq, quantize_weights(bits={bits})"), ctx)
    return graph, ctx


def mean_errors(graph: gs.Graph, ctx: Context) -> list[float]:
    """Of every layer, on the float model's inputs: the largest mean error of a channel."""
    found = []
    for layer, x, _ in sequential(graph, ctx.reference, layers(graph, ctx.reference), ctx.feeds):
        pairs = zip(original_totals(ctx.reference, layer, x), totals(graph, layer, x), strict=True)
        axis = 1 if layer.node.op == "Conv" else -1
        errors = [np.moveaxis(a - b, axis, -1).reshape(-1, a.shape[axis]) for a, b in pairs]
        found.append(float(np.abs(np.concatenate(errors).mean(axis=0)).max()))
    return found


def error(graph: gs.Graph, ctx: Context) -> float:
    """Of the outputs, squared."""
    ours, exact = (Session(model_from_graph(g)) for g in (graph, ctx.reference))
    return sum(float(np.square(ours.run(b)["y"] - exact.run(b)["y"]).sum()) for b in ctx.feeds)


def test_means_agree_after_it() -> None:
    graph, ctx = quantized()
    before, worse = mean_errors(graph, ctx), error(graph, ctx)
    (report,) = run(graph, parse("correct_bias"), ctx, [well_formed])
    assert report.changes == 5
    assert min(before) > 1e-3
    assert max(mean_errors(graph, ctx)) < 1e-5
    assert error(graph, ctx) < worse


def test_products_without_a_bias_get_one() -> None:
    graph, ctx = quantized()
    run(graph, parse("correct_bias"), ctx)
    convs = [n for n in graph.nodes if n.op == "Conv"]
    assert all(constant(n, 2) is not None for n in convs)
    products = [n for n in graph.nodes if n.op == "MatMul"]
    assert all(is_bias(n.outputs[0].outputs[0]) for n in products)


def test_runs_twice_alike() -> None:
    graph, ctx = quantized()
    run(graph, parse("correct_bias"), ctx)
    first = {n: t.values for n, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    count = len(graph.nodes)
    run(graph, parse("correct_bias"), ctx)
    assert len(graph.nodes) == count
    second = mean_errors(graph, ctx)
    assert max(second) < 1e-5
    assert {n for n in first if n.endswith("_q")} <= graph.tensors().keys()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("a = Gemm<beta = 0.0>(q, w5, b5)", "factor 0"),
        ("b = Add(b5, b5) a = Gemm(q, w5, b)", "not constant"),
        ("c = Expand(q, shape2) a = Gemm(q, w5, b6)", "no vector"),
    ],
)
def test_declines_biases_it_cannot_move(body: str, why: str) -> None:
    text = f"p = Reshape(x, shape) q = Slice(p, zero, three, one) {body} y = Relu(a)"
    text = text.replace("c = Expand(q, shape2) ", "")
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 3] x, float[2] b0) => (float[2, 2] y)
        <int64[2] shape = {{2, 3}}, int64[1] zero = {{0}}, int64[1] three = {{3}},
         int64[1] one = {{1}}> {{ {text.replace("Add(b5, b5)", "Add(b0, b0)")} }}"""
    )
    for name, shape in (("w5", (3, 2)), ("b5", (1, 2)), ("b6", (2, 1))):
        if f"{name}" in text:
            values = random.standard_normal(shape).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    graph = graph_from_model(model)
    feeds = [{"x": random.standard_normal((2, 3)).astype(np.float32), "b0": np.ones(2, np.float32)}]
    ctx = Context(facts={"bn-folded", "data", "calibrated", "reference"}, feeds=feeds)
    ctx.ranges = calibrate(graph, feeds).select("minmax")
    ctx.reference = graph.copy()
    run(graph, parse("insert_qdq, quantize_weights"), ctx)
    ctx.skipped.clear()
    (report,) = run(graph, parse("correct_bias"), ctx)
    assert report.changes == 0
    assert why in report.skipped[0][1]


def test_a_product_that_is_an_output_gets_no_add() -> None:
    graph, ctx = quantized(BODY.replace("q = Reshape", "y = Reshape").split("y = Gemm")[0])
    assert run(graph, parse("correct_bias"), ctx)


def test_refuses_to_run_without_the_float_model() -> None:
    graph, ctx = quantized()
    ctx.reference = None
    with pytest.raises(IntqError, match="no float model"):
        run(graph, parse("correct_bias"), ctx)
