from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq import feeds as feeds_file
from onnx_intq.calibrate import calibrate
from onnx_intq.coded_weights import lift
from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.registry import parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, PassError, Report, run
from onnx_intq.verify import well_formed

HEADER = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 6, t] x) => (float[n, m, s] y)"""
NET = """{ d = Conv<group = 6, pads = [2, 2]>(x, w1)
           p = Conv(d, w2)
           r = Relu(p)
           y = MatMul(w3, r) }"""
SHAPES = {"w1": (6, 1, 5), "w2": (9, 6, 1), "w3": (4, 9)}
RECIPE = "insert_qdq, quantize_weights(bits={bits}), {last}"


def graph(body: str, shapes: dict[str, tuple[int, ...]]) -> gs.Graph:
    model = onnx.parser.parse_model(f"{HEADER} {body}")
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return graph_from_model(model)


def drifting(seed: int, *shape: int) -> np.ndarray:
    """Signals [..., 6, 40] that vary slowly, with much in common."""
    random = np.random.default_rng(seed)
    steps = random.standard_normal((*shape, 1, 40)) + 0.3 * random.standard_normal((*shape, 6, 40))
    return np.asarray(np.cumsum(steps, axis=-1) / 4 + 1, np.float32)


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": x} for x in drifting(1, 3, 2)]


def rounded(net: gs.Graph, last: str, bits: int = 4) -> tuple[gs.Graph, Context, list[Report]]:
    """`net`, quantized, and what its passes did."""
    model = net.copy()
    ctx = Context({"bn-folded", "calibrated", "data", "reference"}, feeds=feeds(), reference=net)
    ctx.ranges = calibrate(model, ctx.feeds, threads=1).select()
    recipe = RECIPE.format(bits=bits, last=last)
    return model, ctx, run(model, parse(recipe), ctx, [well_formed])


def integers(model: gs.Graph) -> dict[str, Any]:
    tensors = model.tensors().items()
    return {n: t.values for n, t in tensors if n.endswith("_q") and isinstance(t, gs.Constant)}


def error(net: gs.Graph, model: gs.Graph) -> float:
    """The squared error of the output on the data."""
    sessions = [Session(model_from_graph(g), threads=1) for g in (net, model)]
    a, b = (session.run({"x": drifting(1, 3, 2).reshape(6, 6, 40)})["y"] for session in sessions)
    return float(np.square(a - b).mean())


@pytest.mark.parametrize("last", ["round_weights", "round_weights(compensate=True)"])
def test_the_output_comes_closer_and_integers_move_to_neighbours(last: str) -> None:
    net = graph(NET, SHAPES)
    nearest, _, _ = rounded(net, "drop_identity")
    model, ctx, reports = rounded(net, last)
    assert reports[-1].changes > 0
    assert not ctx.skipped
    assert error(net, model) < 0.8 * error(net, nearest)
    before, after = integers(nearest), integers(model)
    assert before.keys() == after.keys()
    for name, q in after.items():
        assert q.dtype == np.int8
        assert np.abs(q).max() <= 7
        assert np.abs(q.astype(int) - before[name]).max() <= 1


def test_rounding_again_changes_nothing_that_gets_worse() -> None:
    net = graph(NET, SHAPES)
    once, _, _ = rounded(net, "round_weights")
    twice, _, reports = rounded(net, "round_weights, round_weights")
    assert reports[-1].changes <= 1
    assert error(net, twice) <= 1.1 * error(net, once)


def test_the_same_data_gives_the_same_integers() -> None:
    net = graph(NET, SHAPES)
    first, second = (integers(rounded(net, "round_weights")[0]) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["round_weights", "balance_rounding"])
def test_a_shared_weight_is_rounded_once_and_the_other_reader_named(name: str) -> None:
    net = graph("{ a = Conv(x, w)  b = Relu(a)  y = Conv(b, w) }", {"w": (6, 6, 1)})
    _, ctx, reports = rounded(net, name)
    assert reports[-1].changes == 1
    assert [why for _, why in ctx.skipped] == ["shares its weight with a node before"]


def test_silent_inputs_leave_the_weights_alone() -> None:
    net = graph(NET, SHAPES)
    nearest, _, _ = rounded(net, "drop_identity")
    model = net.copy()
    ctx = Context({"bn-folded", "calibrated", "data", "reference"}, reference=net)
    ctx.ranges = calibrate(net, feeds(), threads=1).select()
    ctx.feeds = [{"x": np.zeros((1, 6, 20), np.float32)}]
    run(model, parse(RECIPE.format(bits=4, last="round_weights")), ctx)
    before, after = integers(nearest), integers(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["round_weights", "balance_rounding"])
def test_without_the_float_model_it_says_what_to_do(name: str) -> None:
    net = graph(NET, SHAPES)
    ctx = Context({"quantized", "data", "reference"})
    with pytest.raises(PassError, match="no float model is at hand; expected one; give --data"):
        run(net, parse(name), ctx)


def test_it_runs_from_the_command_line(tiny: Path, command: Any) -> None:
    out = tiny.with_name("q.onnx")
    recipe = "fold_bn, search_ranges, insert_qdq, quantize_weights(bits=4), round_weights"
    data = tiny.with_name("d.npz")
    x = np.random.default_rng(0).standard_normal((2, 4, 30)).astype(np.float32)
    feeds_file.write(data, [{"audio_signal": x}])
    code, _, err = command("quantize", tiny, "-o", out, "--recipe", recipe, "--data", data)
    assert code == 0, err
    assert "round_weights" in Session(out).metadata["onnx_intq.recipe"]


@pytest.mark.parametrize("bits", [2, 4])
def test_weights_are_rounded_within_a_codebook_where_activations_are_float(bits: int) -> None:
    net = graph(NET, SHAPES)
    made, errors = [], []
    for last in ("drop_identity", "round_weights(compensate=True)"):
        model = net.copy()
        ctx = Context({"data", "reference"}, feeds=feeds(), reference=net)
        run(model, parse(f"quantize_codebook(bits={bits}), {last}"), ctx, [well_formed])
        made.append(integers(model))
        errors.append(error(net, model))
    assert errors[1] < 0.8 * errors[0]
    for name, before in made[0].items():
        assert set(np.unique(made[1][name])) <= set(np.unique(before))


def test_weights_that_came_quantized_stay() -> None:
    net = graph(NET, SHAPES)
    run(net, parse("quantize_codebook(bits=4)"), Context())
    coded = lift(net)
    model = net.copy()
    ctx = Context({"bn-folded", "calibrated", "data", "reference"}, feeds=feeds(), reference=net)
    ctx.ranges, ctx.coded = calibrate(model, ctx.feeds, threads=1).select(), coded
    report = run(model, parse(RECIPE.format(bits=8, last="round_weights")), ctx)[-1]
    assert report.changes == 0
    why = "has a weight that came quantized, and stays as it is"
    assert [reason for _, reason in report.skipped] == [why] * 3
