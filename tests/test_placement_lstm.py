"""Where LSTM layers get Q/DQ pairs: on their inputs, and for target integer on their states."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model
from onnx_intq.lowering import operand
from onnx_intq.placement import plan
from onnx_intq.registry import parse
from onnx_intq.transform import Context, Range, run
from onnx_intq.verify import well_formed

RANGES: Mapping[str, Range] = {
    "x": (-3.0, 3.0),
    "h": (-0.5, 0.25),
    "c": (-1.0, 5.0),
    "y": (-0.75, 0.5),
    "s": (-0.75, 0.5),
    "z": (-2.0, 2.0),
    "u": (-0.1, 0.1),
    "e": (-2.0, 7.0),
}


def graph(body: str = "") -> gs.Graph:
    """A layer with states, and a product of what it gives."""
    body = body or "y, u, e = LSTM<hidden_size = 3>(x, w, r, none, none, h, c)"
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[t, 2, 3] x, float[1, 2, 3] h, float[1, 2, 3] c)
        => (float[t, 2, 4] z, float[1, 2, 3] u, float[1, 2, 3] e) <int64[1] one = {{1}}> {{
            {body} s = Squeeze(y, one) z = MatMul(s, m) }}"""
    )
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "" if name == "none" else name
    random = np.random.default_rng(0)
    for name, shape in {"w": (1, 12, 3), "r": (1, 12, 3), "m": (3, 4)}.items():
        values = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return graph_from_model(model)


@pytest.mark.parametrize("target", ["ort", "integer"])
def test_the_input_gets_a_pair(target: str) -> None:
    found = plan(graph(), target)
    assert [node.op for node in found.nodes] == ["LSTM", "MatMul"]
    assert set(found.tensors) == {"x", "s", "z"}
    assert found.skipped == []


def test_tensorrt_has_none() -> None:
    found = plan(graph(), "tensorrt")
    assert [(node.op, why) for node, why in found.skipped] == [
        ("LSTM", "tensorrt has no integer LSTM")
    ]
    assert set(found.tensors) == {"s"}


def completed(ranges: Mapping[str, Range], cpu: str = "any") -> dict[str, Any]:
    """The grids of what the layer reads and makes, by the name of the float tensor."""
    model, ctx = graph(), Context(facts={"bn-folded", "calibrated"})
    ctx.ranges, ctx.reach = dict(ranges), {n: (2 * a, 2 * b) for n, (a, b) in ranges.items()}
    passes = parse(f"insert_qdq(target='integer'), complete_qdq(cpu={cpu!r})")
    run(model, passes, ctx, [well_formed])
    (node,) = [n for n in model.nodes if n.op == "LSTM"]
    reads = {name: operand(node.inputs[i]) for name, i in (("x", 0), ("h", 5), ("c", 6))}
    makes = {
        name: next((operand(n.outputs[0]) for q in t.outputs for n in q.outputs[0].outputs), None)
        for name, t in zip("yue", node.outputs, strict=True)
    }
    return {**reads, **makes}


@pytest.mark.parametrize("cpu", ["any", "vnni"])
def test_states_share_their_grids(cpu: str) -> None:
    """Also where a reader has quantized what a layer gives: one grid for all, of all ranges."""
    found = completed(RANGES, cpu)
    hidden = {(found[n].scale, found[n].zero_point, found[n].grid.signed) for n in "hyu"}
    assert hidden == {(float(np.float32(1.25 / 255)), 153, False)}
    cells = {(found[n].scale, found[n].zero_point, found[n].grid.dtype.name) for n in "ce"}
    assert cells == {(2.0**-12, 0, "int16")}  # 7 is below 8
    assert found["x"].grid.bits == 8


def test_cells_of_unknown_range_are_named() -> None:
    model, ctx = graph(), Context(facts={"bn-folded", "calibrated"})
    ctx.ranges = {name: limits for name, limits in RANGES.items() if name not in "ce"}
    run(model, parse("insert_qdq(target='integer'), complete_qdq"), ctx, [well_formed])
    assert [why.split(";")[0] for _, why in ctx.remaining] == [
        "the range of its result 'c' is unknown",
        "the range of its result 'e' is unknown",
    ]


def test_a_residual_around_a_layer_is_quantized() -> None:
    layer = "l = LSTM<hidden_size = 3>(x, w, r) k = Squeeze(l, one) a = MatMul(x, m3) b = Add(k, a)"
    body = f"{layer} y = Unsqueeze(b, one) u = Identity(h) e = Identity(c)"
    model = graph(body.replace("m3", "w3"))
    for node in model.nodes:
        if node.op == "MatMul" and node.inputs[1].name == "w3":
            node.inputs[1] = gs.Constant("w3", np.ones((3, 3), np.float32))
    assert "Add" in [node.op for node in plan(model, "ort").nodes]
