import gc
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.calibrate import calibrate
from onnx_intq.check import check
from onnx_intq.feeds import Batch
from onnx_intq.graph import graph_from_model, load, metadata, model_from_graph, save
from onnx_intq.integer_only import prove
from onnx_intq.lowering import GRIDS_KEY
from onnx_intq.recipes import BOOST, BOOSTERS, CLEAN, FUSE, PREPARE, TARGETS, pipeline
from onnx_intq.registry import parse, render
from onnx_intq.runtime import Session, optimized_ops
from onnx_intq.transform import Context, Hook, IntqError, run
from onnx_intq.verify import SameFunction, small_feeds, well_formed

law = settings(derandomize=True, deadline=None, max_examples=25)
CHANNELS = 16
PREPARED = len(parse(PREPARE))
"""Passes."""


def normalized(result: str, source: str, name: str) -> str:
    """A convolution with a BatchNormalization behind it."""
    return (
        f"{result}_c = Conv<{name}>({source}, {result}_w)\n"
        f"{result} = BatchNormalization({result}_c, "
        f"{result}_g, {result}_b, {result}_m, {result}_v)\n"
    )


def block(number: int, source: str) -> str:
    """A block of QuartzNet: two separable convolutions, and a residual one."""
    depthwise, i = f"group = {CHANNELS}, pads = [2, 2]", number
    return (
        f"d{i} = Conv<{depthwise}>({source}, d{i}_w)\n"
        + normalized(f"p{i}", f"d{i}", "group = 1")
        + f"r{i} = Relu(p{i})\n"
        + f"e{i} = Conv<{depthwise}>(r{i}, d{i}_w)\n"
        + normalized(f"q{i}", f"e{i}", "group = 1")
        + normalized(f"s{i}", source, "group = 1")
        + f"a{i} = Add(q{i}, s{i})\n"
        + f"o{i} = Identity(a{i})\n"
        + f"x{i + 1} = Relu(o{i})\n"
    )


def quartznet(blocks: int) -> gs.Graph:
    """12 nodes a block, and a decoder."""
    body = "".join(block(i, f"x{i}") for i in range(blocks))
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, {CHANNELS}, time] x0) => (float[batch, time, 8] y) {{
            {body}
            logits = Conv(x{blocks}, l_w, l_b)
            moved = Transpose<perm = [0, 2, 1]>(logits)
            y = LogSoftmax<axis = -1>(moved)
        }}"""
    model = onnx.parser.parse_model(text)
    names = {name for node in model.graph.node for name in node.input if "_" in name}
    made = {name for node in model.graph.node for name in node.output}
    for name in sorted(names - made):
        tensor = onnx.numpy_helper.from_array(weight(name), name)
        model.graph.initializer.append(tensor)
    return graph_from_model(model)


def weight(name: str) -> npt.NDArray[np.float32]:
    random = np.random.default_rng(sum(map(ord, name)))
    values: npt.NDArray[np.float64]
    match name[0], name.rpartition("_")[2]:
        case "d", _:
            values = random.standard_normal((CHANNELS, 1, 5)) / np.sqrt(5)
        case "l", "w":
            values = random.standard_normal((8, CHANNELS, 1)) / np.sqrt(CHANNELS)
        case "l", _:
            values = random.standard_normal(8)
        case _, "w":
            values = random.standard_normal((CHANNELS, CHANNELS, 1)) / np.sqrt(CHANNELS)
        case _, "g" | "v":
            values = random.uniform(0.5, 1.5, CHANNELS)
        case _:
            values = random.uniform(-0.5, 0.5, CHANNELS)
    return values.astype(np.float32)


def quantize(model: gs.Graph, target: str, **options: Any) -> SameFunction:
    """Prepare, calibrate and quantize, every pass checked; returns the comparison."""
    feeds, same = small_feeds(model), SameFunction(small_feeds(model))
    same.start(model)
    ctx = Context()
    hooks: list[Hook] = [well_formed, same]
    passes = pipeline(target, **options)
    split = next(i for i, spec in enumerate(passes) if "calibrated" in spec.needs)
    run(model, passes[:split], ctx, hooks)
    symmetric = target == "tensorrt"
    ctx.ranges = calibrate(model, [feeds], threads=1).select("minmax", symmetric=symmetric)
    ctx.facts.add("calibrated")
    run(model, passes[split:], ctx, hooks)
    assert not ctx.skipped
    return same


def test_the_text_names_every_choice() -> None:
    assert (
        render(pipeline("ort", boost=()))
        == f"{PREPARE}, insert_qdq, quantize_tables, quantize_weights"
    )
    chosen = pipeline(
        "tensorrt",
        weight_bits=6,
        weight_scale="minmax",
        keep=("a'", "b"),
        overrides=[("c*", 4)],
        boost=(),
    )
    assert render(chosen[PREPARED:]) == (
        """fuse_nonlinear, insert_qdq(target='tensorrt', keep=("a'", 'b')), """
        """insert_islands(keep=("a'", 'b')), quantize_tables, """
        "quantize_weights(bits=6, scale='minmax', overrides=(('c*', 4),), recurrent=True), "
        "integerize_nonlinear(target='tensorrt')"
    )
    assert (
        render(pipeline("ort", activation_bits=16, boost=())[PREPARED:])
        == "insert_qdq(bits=16), quantize_tables, quantize_weights"
    )


def test_the_integer_target_names_its_choices_and_starts_where_the_model_is() -> None:
    text = render(
        pipeline("integer", nonlinear="lut", io="int8", cpu="vnni", weight_bits=4, boost=())
    )
    insert = "insert_qdq(target='integer', tables=True)"
    start = f"{PREPARE}, {FUSE}, {insert}, complete_qdq(cpu='vnni'), "
    assert text.startswith(f"{start}quantize_weights(bits=4), ")
    assert "integerize_softmax(mode='lut'), " in text
    assert "integerize_matmul(cpu='vnni'), " in text
    assert text.endswith(", integerize_boundary(io='int8')")
    text = render(pipeline("integer", quantized=True))
    assert text.startswith(f"{CLEAN}, {FUSE}, complete_qdq, quantize_weights, ")
    assert text.endswith(", integerize_boundary")
    assert "insert_qdq" not in text
    assert "fold_bn" not in text


def test_boosters_stand_where_their_facts_hold() -> None:
    names = [p.name for p in pipeline("integer", boost=BOOSTERS, mixed=True)]
    order = ["equalize", "choose_grids", "insert_qdq", "complete_qdq", "quantize_weights"]
    order += ["round_weights", "correct_bias", "integerize_conv"]
    assert [name for name in names if name in order] == order
    assert render(pipeline("ort", boost=BOOST)).endswith(
        "quantize_weights, round_weights, correct_bias"
    )
    assert "round_weights(compensate=True)" in render(pipeline("ort", weight_bits=4, boost=BOOST))
    assert "choose_grids(limit=0.0)" in render(pipeline("ort", boost=["choose_grids"]))
    assert "choose_grids(target='tensorrt')" in render(pipeline("tensorrt", mixed=True))
    assert not {"round_weights", "correct_bias"} & {
        p.name for p in pipeline("integer", quantized=True, boost=BOOST)
    }
    with pytest.raises(IntqError, match=r"unknown booster 'turbo'; expected some of: equalize"):
        pipeline("ort", boost=["turbo"])


@pytest.mark.parametrize("options", [{"activation_bits": 16}, {"wide": ["a"]}])
def test_products_of_integers_may_have_16_bits(options: dict[str, Any]) -> None:
    text = render(pipeline("integer", **options))
    assert ("bits=16" in text) != ("wide=('a',)" in text)


def test_no_node_stays_float_by_request() -> None:
    with pytest.raises(IntqError, match=r"nodes a, b\* kept float for target integer; .*; leave"):
        pipeline("integer", keep=["a", "b*"])


@law
@given(
    st.sampled_from(TARGETS),
    st.integers(),
    st.integers(),
    st.text(),
    st.lists(st.text()),
    st.lists(st.tuples(st.text(), st.integers())),
)
def test_any_choice_reads_back(
    target: str, w: int, a: int, scale: str, keep: list[str], overrides: list[tuple[str, int]]
) -> None:
    passes = pipeline(
        target,
        weight_bits=w,
        activation_bits=8 if target == "integer" else a,
        weight_scale=scale,
        keep=() if target == "integer" else keep,
        overrides=overrides,
    )
    assert parse(render(passes)) == passes
    assert passes[:PREPARED] == parse(PREPARE)


def test_preparation_is_exact() -> None:
    assert all(spec.exact for spec in parse(PREPARE))


def test_targets_are_checked() -> None:
    with pytest.raises(IntqError, match="unknown target 'x'; expected one of: ort, tensorrt"):
        pipeline("x")


@pytest.mark.parametrize("target", TARGETS)
def test_a_quantized_network_hears_what_the_float_one_does(target: str) -> None:
    model = quartznet(2)
    same = quantize(model, target)
    assert (prove(model) if target == "integer" else check(model, target)) == []
    # Two blocks of 8-bit roundings, each some 45 dB below its tensor for min-max ranges.
    assert same.drift_of(model).sqnr > 25


def test_onnxruntime_runs_it_on_integers_from_end_to_end() -> None:
    model = quartznet(2)
    quantize(model, "ort")
    found = optimized_ops(model_from_graph(model))
    assert {op: n for op, n in found.items() if op not in {"Transpose", "LogSoftmax"}} == {
        "QuantizeLinear": 1,
        "QLinearConv": 11,
        "QLinearAdd": 2,
        "DequantizeLinear": 1,
    }


def test_the_integer_target_needs_little_but_products_and_requantisation() -> None:
    model = quartznet(2)
    quantize(model, "integer")
    found = Counter(node.op for node in model.nodes)
    products = {op: found[op] for op in ("QuantizeLinear", "ConvInteger", "DequantizeLinear")}
    assert products == {"QuantizeLinear": 1, "ConvInteger": 11, "DequantizeLinear": 1}
    # One for each of 11 products and 2 residual sums, one for the log-softmax of 16 bits.
    assert found["Clip"] == 14


JOINED = [
    "b = MaxPool<kernel_shape = [3], pads = [1, 1]>(a) y = Relu(b)",
    "b = Concat<axis = 1>(a, a) c = Clip(b, low, high) y = Neg(c)",
    "b = AveragePool<kernel_shape = [3]>(a) y = Clip(b, low)",
    "b = Sigmoid(a) y = Clip(b, low, half)",
    "b = Relu(a) y = Clip(b, low, half)",
]


@pytest.mark.parametrize("body", JOINED)
def test_activations_may_follow_any_operator(body: str) -> None:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[2, 4, 9] x) => (float[a, b, c] y)
        <float s = {{0.02}}, uint8 z = {{100}}, float low = {{-0.5}}, float half = {{0.5}},
         float high = {{1.5}}> {{
            q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) {body}
        }}"""
    )
    model, ctx = graph_from_model(proto), Context(facts={"quantized"})
    x = np.random.default_rng(0).uniform(-3, 4, (2, 4, 9)).astype(np.float32)
    before = Session(proto, threads=1).run({"x": x})["y"]
    run(model, pipeline("integer", quantized=True), ctx, [well_formed])
    assert (ctx.remaining, prove(model)) == ([], [])
    after = Session(model_from_graph(model), threads=1).run({"x": x})["y"]
    assert np.abs(after - before).max() < 2.0**-10


def integers(model: gs.Graph, feeds: Batch) -> dict[str, Any]:
    """Every recorded integer tensor by the name of its float tensor."""
    names = json.loads(metadata(model)[GRIDS_KEY])
    known, own = model.tensors(), model.outputs
    model.outputs = [known[name] for name in names]
    found = Session(model_from_graph(model), threads=1).run(feeds)
    model.outputs = own
    return {names[name][0]: (values, names[name][1:]) for name, values in found.items()}


def test_a_quantized_model_gives_the_integers_that_its_float_model_gives() -> None:
    direct, lowered = quartznet(2), quartznet(2)
    quantize(direct, "integer")
    quantize(lowered, "ort")
    feeds = small_feeds(lowered)
    before = Session(model_from_graph(lowered), threads=1).run(feeds)["y"]
    run(lowered, pipeline("integer", quantized=True), Context(facts={"quantized"}), [well_formed])
    assert prove(lowered) == []
    one, other = integers(direct, feeds), integers(lowered, feeds)
    assert one.keys() == other.keys()
    assert {"x0", "x1", "x2", "logits", "y"} <= one.keys()
    for name, (values, grid) in one.items():
        assert grid == other[name][1]
        np.testing.assert_array_equal(values, other[name][0])
    # The logits are those of the Q/DQ model; a log-softmax of 16 bits errs by 2^-8 at most.
    after = Session(model_from_graph(lowered), threads=1).run(feeds)["y"]
    assert np.abs(after - before).max() <= 2.0**-8


@pytest.mark.parametrize("bits", range(2, 9))
def test_more_bits_are_nearer_to_the_float_network(bits: int) -> None:
    model = quartznet(1)
    same = quantize(model, "ort", weight_bits=bits)
    # 6 dB for each bit of the weights, from 1 dB for 2 bits on, until activations dominate.
    assert same.drift_of(model).sqnr > min(6 * bits - 11, 28)


@pytest.mark.parametrize("target", ["ort", "integer"])
def test_the_same_model_and_ranges_give_the_same_bytes(tmp_path: Path, target: str) -> None:
    models = [quartznet(1), quartznet(1)]
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for model, path in zip(models, paths, strict=True):
        quantize(model, target)
        save(model, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    feeds = small_feeds(load(paths[0]))
    found, before = (
        Session(source, threads=1).run(feeds)["y"]
        for source in (paths[0], model_from_graph(models[0]))
    )
    np.testing.assert_array_equal(found, before)


def passes_time(blocks: int) -> tuple[int, float]:
    """Nodes of the float model, and processor seconds that all passes and checks take."""
    model = quartznet(blocks)
    nodes = len(model.nodes)
    ranges = {t.name: (-1.0, 1.0) for node in model.nodes for t in node.outputs}
    ctx = Context(facts={"calibrated"}, ranges={"x0": (-1.0, 1.0), **ranges})
    gc.collect()
    gc.disable()  # its full collections grow faster than the heap, and are not ours to time
    try:
        start = time.process_time()
        reports = run(model, pipeline("ort", weight_scale="minmax"), ctx, [well_formed])
        seconds = time.process_time() - start
    finally:
        gc.enable()
    changes = [r.changes for r in reports if r.changes]
    assert changes == [blocks, 3 * blocks, 6 * blocks + 1, 4 * blocks + 1]
    return nodes, seconds


@pytest.mark.slow
def test_time_is_linear_in_the_number_of_nodes() -> None:
    # The shortest of three: others may use the machine at the same time.
    small, large = (min(passes_time(n) for _ in range(3)) for n in (84, 334))
    assert (small[0], large[0]) == (1011, 4011)
    # Four times the nodes; half as much again for noise and caches.
    assert large[1] < 6 * small[1]
