from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.calibrate import calibrate
from onnx_intq.feeds import Batch
from onnx_intq.graph import graph_from_model
from onnx_intq.reference import _run, layers, original_totals, sequential, totals
from onnx_intq.registry import parse
from onnx_intq.segments import Segments, cut
from onnx_intq.transform import Context, run

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 4, 10] x) => (float[n, 10, 3] y) {
        a = Conv<pads = [1, 1]>(x, w1, b1)
        r = Relu(a)
        d = Conv<group = 6>(r, w2)
        t = Transpose<perm = [0, 2, 1]>(d)
        m = MatMul(t, w3)
        z = Add(b3, m)
        u = Add(z, z)
        y = MatMul(u, w4)
    }"""
SHAPES = {"w1": (6, 4, 3), "b1": (6,), "w2": (6, 1, 1), "w3": (6, 5), "b3": (5,), "w4": (5, 3)}


@pytest.fixture
def pair() -> SimpleNamespace:
    """A model, quantized, its reference and three batches."""
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in SHAPES.items():
        values = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    graph = graph_from_model(model)
    feeds = [{"x": random.standard_normal((2, 4, 10)).astype(np.float32)} for _ in range(3)]
    ranges = calibrate(graph, feeds).select("minmax")
    reference = graph.copy()
    ctx = Context(facts={"bn-folded", "calibrated"}, ranges=ranges)
    run(graph, parse("insert_qdq, quantize_weights(bits=5)"), ctx)
    return SimpleNamespace(model=graph, reference=reference, feeds=feeds)


def values(graph: gs.Graph, name: str, feeds: list[Batch]) -> list[npt.NDArray[Any]]:
    return [dict(Segments(graph, [name], threads=1).run(batch))[name] for batch in feeds]


def test_pairs_every_product(pair: SimpleNamespace) -> None:
    found = layers(pair.model, pair.reference)
    assert [layer.original_x.name for layer in found] == ["x", "r", "t", "u"]
    assert [layer.original_total.name for layer in found] == ["a", "d", "z", "y"]
    assert [layer.name for layer in found] == [layer.original.name for layer in found]
    for layer, name in zip(found, ("w1", "w2", "w3", "w4"), strict=True):
        assert layer.float_weight.shape == SHAPES[name] == layer.stored.shape
        real = layer.quantized_weight
        scales = real.scales.reshape(
            [-1 if i == real.axis else 1 for i in range(real.centred.ndim)]
        )
        half = np.broadcast_to(scales, SHAPES[name]) / 2
        inside = np.abs(real.centred) < 15
        error = np.abs(real.centred * scales - layer.float_weight)
        assert (error[inside] <= half[inside] * 1.001).all()


def test_leaves_out_what_has_no_counterpart(pair: SimpleNamespace) -> None:
    pair.reference.nodes[0].name = "other"
    pair.reference.nodes[2].op = "Other"
    assert len(layers(pair.model, pair.reference)) == 2


def test_weight_on_the_left_is_found(pair: SimpleNamespace) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[4, 3] x) => (float[5, 3] y) { y = MatMul(w, x) }"""
    model = onnx.parser.parse_model(text)
    w = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    graph = graph_from_model(model)
    reference = graph.copy()
    ctx = Context(facts={"bn-folded", "calibrated"}, ranges={"x": (-1, 1), "y": (-4, 4)})
    run(graph, parse("insert_qdq, quantize_weights"), ctx)
    (layer,) = layers(graph, reference)
    assert layer.index == 0
    assert layer.original_x.name == "x"


def test_unchanged_both_run_as_the_whole_graphs(pair: SimpleNamespace) -> None:
    found = layers(pair.model, pair.reference)
    seen = []
    for layer, x, quantized in sequential(pair.model, pair.reference, found, pair.feeds):
        seen.append(layer)
        for ours, whole in zip(
            x, values(pair.reference, layer.original_x.name, pair.feeds), strict=True
        ):
            np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-5)
        whole_quantized = values(pair.model, layer.x.name, pair.feeds)
        for ours, whole in zip(quantized, whole_quantized, strict=True):
            np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-5)
        sums = original_totals(pair.reference, layer, x)
        wanted = values(pair.reference, layer.original_total.name, pair.feeds)
        np.testing.assert_allclose(sums[0], wanted[0], rtol=0, atol=1e-4)
        assert len(totals(pair.model, layer, quantized)) == 3
    assert seen == found


def test_changes_reach_later_layers_only(pair: SimpleNamespace) -> None:
    found = layers(pair.model, pair.reference)
    before = [q for _, _, q in sequential(pair.model, pair.reference, found, pair.feeds)]
    after = []
    for layer, _, quantized in sequential(pair.model, pair.reference, found, pair.feeds):
        after.append(quantized)
        if layer is found[1]:
            layer.stored.values = np.zeros_like(layer.stored.values)
            assert not any(y.any() for y in totals(pair.model, layer, quantized))
    same = [np.array_equal(a[0], b[0]) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, False, False]


INT8_PAIR = """<ir_version: 10, opset_import: ["" : 21]>
    g (uint8[batch, time, 4] q) => (float[batch, time, 1, 3] y)
    <float s = {0.1}, uint8 u = {127}, int8 z = {5}, int64[1] axes = {2}> {
        x = DequantizeLinear(q, s, u)
        v = DequantizeLinear(stored, s)
        m = MatMul(x, v)
        b = Add(m, bias)
        p = QuantizeLinear(b, s, z)
        d = DequantizeLinear(p, s, z)
        e = Unsqueeze(d, axes)
        [last] y = MatMul(e, w)
    }"""


def test_an_int8_pair_in_front_of_unsqueeze_runs() -> None:
    """It does not in onnxruntime 1.31 with its optimizations, on x86."""
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(INT8_PAIR)
    known: dict[str, npt.NDArray[Any]] = {
        "stored": random.integers(-9, 9, (4, 3)).astype(np.int8),
        "bias": np.ones(3, np.float32),
        "w": np.eye(3, dtype=np.float32),
    }
    for name, values_ in known.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values_, name))
    graph = graph_from_model(model)
    feeds = [{"q": random.integers(0, 256, (2, 5, 4)).astype(np.uint8)}]
    (part,) = cut(graph, {"e"}, 1)[:1]
    (found,) = _run(graph, part, feeds)
    sums = (feeds[0]["q"].astype(int) - 127) @ known["stored"].astype(int) * 0.01 + 1
    wanted = np.clip(np.rint(sums * 10), -133, 122)[:, :, None] / 10
    np.testing.assert_allclose(found["e"], wanted, rtol=0, atol=0.11)
