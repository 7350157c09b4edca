"""Grids are chosen by what they cost the result; what needs more than 8 bits gets it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.calibrate import calibrate
from onnx_intq.graph import graph_from_model, metadata, model_from_graph
from onnx_intq.integer_only import examine
from onnx_intq.recipes import pipeline
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, PassError, run
from onnx_intq.verify import drift, well_formed

ChooseGrids: Any = load("choose_grids")
FACTS = {"bn-folded", "data", "calibrated"}
NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, t, 8] x) => (float[n, t, 8] y) {
        a = MatMul(x, v)
        p = LayerNormalization(a, gain)
        b = MatMul(p, w)
        q = Relu(b)
        c = MatMul(q, u)
        y = Add(c, bias)
    }"""


@pytest.fixture
def network() -> gs.Graph:
    """A network that hears soft frames as well as loud ones."""
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((8, 8)) for name in ("v", "w", "u")}
    proto = onnx.parser.parse_model(NETWORK)
    for name, values in (weights | {"bias": np.ones(8), "gain": np.ones(8)}).items():
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), name)
        proto.graph.initializer.append(tensor)
    graph = graph_from_model(proto)
    for number, node in enumerate(graph.nodes):
        node.name = f"{node.op}_{number}"
    return graph


def feeds() -> list[dict[str, Any]]:
    random = np.random.default_rng(1)
    loudness = 10.0 ** random.uniform(-1, 1, (3, 2, 40, 1))
    return [{"x": v.astype(np.float32)} for v in loudness * random.standard_normal((3, 2, 40, 8))]


def context(graph: gs.Graph, observer: str = "minmax", *, symmetric: bool = False) -> Context:
    found = calibrate(graph, feeds(), threads=1)
    return Context(
        facts=set(FACTS),
        feeds=feeds(),
        ranges=found.select(observer, symmetric=symmetric),
        alternatives=found.alternatives(symmetric=symmetric),
    )


def quantized(network: gs.Graph, target: str, **options: Any) -> tuple[gs.Graph, Context]:
    """The network, quantized for `target` by its whole recipe."""
    passes = pipeline(target, mixed=True, weight_scale="minmax")
    start = next(i for i, p in enumerate(passes) if p.name == "choose_grids")
    passes[start] = ChooseGrids(target=target, **options)
    ctx = Context(facts={"bn-folded"})
    run(network, passes[:start], ctx, [well_formed])
    known = context(network, symmetric=target == "tensorrt")
    known.facts |= ctx.facts
    run(network, passes[start:], known, [well_formed])
    return network, known


def sqnr(network: gs.Graph, other: gs.Graph) -> float:
    (feed, *_) = feeds()
    exact, found = (Session(model_from_graph(g)).run(feed) for g in (network, other))
    return drift(exact, found).sqnr


def test_a_tensor_of_wide_range_needs_more_than_8_bits(network: gs.Graph) -> None:
    before, ctx = network.copy(), context(network)
    (report,) = run(network, [ChooseGrids(target="integer")], ctx, [well_formed])
    assert report.changes >= 1
    assert set(ctx.wide) == {"x"}
    assert ctx.wide["x"] < 20
    assert json.loads(metadata(network)["onnx_intq.wide"]) == ctx.wide
    assert [n.op for n in network.nodes] == [n.op for n in before.nodes]


def test_a_lower_limit_asks_for_less(network: gs.Graph) -> None:
    ctx = context(network)
    run(network, [ChooseGrids(target="integer", limit=0.0)], ctx)
    assert not ctx.wide
    all_wide = context(network)
    run(network, [ChooseGrids(target="integer", limit=99.0)], all_wide)
    assert set(all_wide.wide) == {"x", "p", "q", "y"}


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_who_reads_it_stays_float_where_no_wide_product_is(network: gs.Graph, target: str) -> None:
    exact = network.copy()
    narrow, _ = quantized(network.copy(), target, limit=0.0)
    mixed, ctx = quantized(network.copy(), target)
    why = dict(ctx.skipped)["MatMul_0"]
    assert why.startswith("8 bits for 'x' alone would leave ")
    assert why.endswith("dB of the result; all together are to leave 25")
    assert sqnr(exact, mixed) > sqnr(exact, narrow) + 10


def test_target_integer_multiplies_16_bits(network: gs.Graph) -> None:
    exact = network.copy()
    mixed, ctx = quantized(network, "integer")
    assert not ctx.remaining
    assert examine(model_from_graph(mixed)).findings == ()
    assert [n.op for n in mixed.nodes].count("MatMulInteger") == 4
    assert sqnr(exact, mixed) > 30


def test_the_range_is_taken_that_keeps_the_result(network: gs.Graph) -> None:
    ctx = context(network, "percentile")
    ctx.alternatives = {"q": [(0.0, 1e-3), (0.0, 1e5), (0.0, 20.0)]}
    ctx.ranges = {**ctx.ranges, "q": (0.0, 1e5)}
    before = dict(ctx.ranges)
    run(network, [ChooseGrids(target="ort", limit=0.0)], ctx)
    assert ctx.ranges["q"] == (0.0, 20.0)
    assert {n: r for n, r in ctx.ranges.items() if n != "q"} == {
        n: r for n, r in before.items() if n != "q"
    }


def test_results_of_convolutions_count_where_they_must_be_integers() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4, t] x) => (float[n, 4, s] y) {
            a = Conv(x, v)
            b = Softplus(a)
            y = Conv(b, v)
        }"""
    proto = onnx.parser.parse_model(text)
    values = np.random.default_rng(0).standard_normal((4, 4, 1)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, "v"))
    graph = graph_from_model(proto)
    for number, node in enumerate(graph.nodes):
        node.name = f"{node.op}_{number}"
    batch = {"x": np.random.default_rng(1).standard_normal((2, 4, 30)).astype(np.float32)}
    ranges = calibrate(graph, [batch], threads=1).select("minmax")
    ranges["a"] = (-1e4, 1e4)
    for target, floats in (("ort", {"Conv_0"}), ("tensorrt", set[str]())):
        ctx = Context(facts=set(FACTS), feeds=[batch], ranges=ranges)
        run(graph.copy(), [ChooseGrids(target=target, limit=20.0)], ctx)
        assert ctx.floats.keys() == floats


def test_a_model_torch_cannot_run_keeps_its_ranges_unless_widths_are_asked_for() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x) => (float[n, 4] y, float[n, 4] d) { y = MatMul(x, w) d = Bernoulli(x) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    graph = graph_from_model(proto)
    batch = {"x": np.ones((2, 4), np.float32)}
    ctx = Context(facts=set(FACTS), feeds=[batch], ranges={"x": (0.0, 1.0), "y": (0.0, 1.0)})
    run(graph, [ChooseGrids(limit=0.0)], ctx)
    ((name, why),) = ctx.skipped
    assert name == "choose_grids"
    assert why.startswith("ranges stay as calibration chose them: ")
    with pytest.raises(PassError, match="Bernoulli"):
        run(graph, [ChooseGrids()], ctx)


def test_no_samples_are_refused(network: gs.Graph) -> None:
    with pytest.raises(PassError, match="0 samples; expected at least one"):
        run(network, [ChooseGrids(samples=0)], context(network))
