import time
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
from onnx_intq.graph import graph_from_model, load, model_from_graph, save
from onnx_intq.recipes import PREPARE, TARGETS, pipeline
from onnx_intq.registry import parse, render
from onnx_intq.runtime import Session, optimized_ops
from onnx_intq.transform import Context, Hook, IntqError, run
from onnx_intq.verify import SameFunction, small_feeds, well_formed

law = settings(derandomize=True, deadline=None, max_examples=25)
CHANNELS = 16


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
    run(model, passes[:3], ctx, hooks)
    ctx.ranges = calibrate(model, [feeds], threads=1).select("minmax", symmetric=target != "ort")
    ctx.facts.add("calibrated")
    run(model, passes[3:], ctx, hooks)
    assert not ctx.skipped
    return same


def test_the_text_names_every_choice() -> None:
    assert render(pipeline("ort")) == f"{PREPARE}, insert_qdq, quantize_weights"
    chosen = pipeline(
        "tensorrt",
        weight_bits=6,
        weight_scale="minmax",
        keep=("a'", "b"),
        overrides=[("c*", 4)],
    )
    assert render(chosen[3:]) == (
        """insert_qdq(target='tensorrt', keep=("a'", 'b')), """
        "quantize_weights(bits=6, scale='minmax', overrides=(('c*', 4),))"
    )
    assert (
        render(pipeline("ort", activation_bits=16)[3:]) == "insert_qdq(bits=16), quantize_weights"
    )


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
        activation_bits=a,
        weight_scale=scale,
        keep=keep,
        overrides=overrides,
    )
    assert parse(render(passes)) == passes
    assert passes[:3] == parse(PREPARE)


def test_preparation_is_exact() -> None:
    assert all(spec.exact for spec in parse(PREPARE))


def test_targets_are_checked() -> None:
    with pytest.raises(IntqError, match="unknown target 'x'; expected one of: ort, tensorrt"):
        pipeline("x")


@pytest.mark.parametrize("target", TARGETS)
def test_a_quantized_network_hears_what_the_float_one_does(target: str) -> None:
    model = quartznet(2)
    same = quantize(model, target)
    assert check(model, target) == []
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


@pytest.mark.parametrize("bits", range(2, 9))
def test_more_bits_are_nearer_to_the_float_network(bits: int) -> None:
    model = quartznet(1)
    same = quantize(model, "ort", weight_bits=bits)
    # 6 dB for each bit of the weights, from 1 dB for 2 bits on, until activations dominate.
    assert same.drift_of(model).sqnr > min(6 * bits - 11, 28)


def test_the_same_model_and_ranges_give_the_same_bytes(tmp_path: Path) -> None:
    models = [quartznet(1), quartznet(1)]
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for model, path in zip(models, paths, strict=True):
        quantize(model, "ort")
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
    start = time.process_time()
    reports = run(model, pipeline("ort", weight_scale="minmax"), ctx, [well_formed])
    assert [r.changes for r in reports] == [0, blocks, 3 * blocks, 6 * blocks + 1, 4 * blocks + 1]
    return nodes, time.process_time() - start


@pytest.mark.slow
def test_time_is_linear_in_the_number_of_nodes() -> None:
    small, large = passes_time(84), passes_time(334)
    assert (small[0], large[0]) == (1011, 4011)
    # Four times the nodes; half as much again for noise and caches.
    assert large[1] < 6 * small[1]
