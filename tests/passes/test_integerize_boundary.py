"""Pairs inside the graph become integers; at the boundary one node is left per input and output."""

import json
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, metadata, model_from_graph
from onnx_intq.grid import dyadic, requantize
from onnx_intq.integer_only import examine, prove
from onnx_intq.lowering import GRIDS, GRIDS_KEY
from onnx_intq.real_io import RealSession
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, IntqError, PassError, run
from onnx_intq.verify import well_formed

IntegerizeBoundary = load("integerize_boundary")
XS, YS = np.float32(0.02), np.float32(0.05)
law = settings(max_examples=40, deadline=None)
GRID_NAMES = st.sampled_from(sorted(GRIDS))
PAIR = "a = DequantizeLinear(x, xs, xz) q = QuantizeLinear(a, ys, yz)"
NET = """p = QuantizeLinear(x, xs, xz) a = DequantizeLinear(p, xs, xz)
    b = QuantizeLinear(a, ys, yz) y = DequantizeLinear(b, ys, yz)"""
GRIDS_OF_NET = {"p": ["x", float(XS), 7], "b": ["y", float(YS), -7]}


def graph(inputs: str, outputs: str, body: str, **given_: Any) -> Any:
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    points = {"xs": XS, "ys": YS, "xz": np.uint8(7), "yz": np.int8(-7)}
    for name, values in (points | given_).items():
        if name in body:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def net(body: str = NET, inputs: str = "float[n] x", outputs: str = "float[n] y") -> Any:
    """A graph whose integer tensors are recorded, as `complete_qdq` leaves it."""
    model = graph(inputs, outputs, body)
    metadata(model)[GRIDS_KEY] = json.dumps(GRIDS_OF_NET)
    return model


def lower(model: gs.Graph, left: tuple[str, ...] = (), **options: Any) -> int:
    """Lower; doing so again must change nothing. Returns how many places changed.

    The operators `left` are float and stay.
    """
    ctx, spec = Context(facts={"complete"}), IntegerizeBoundary(**options)
    first, second = run(model, [spec, spec], ctx, [well_formed])
    assert (second.changes, second.skipped) == (0, ())
    assert [why for _, why in ctx.remaining] == [f"no pass makes integers of {op}" for op in left]
    assert "integer" in ctx.facts
    return first.changes


def ops(model: gs.Graph) -> list[str]:
    return sorted(node.op for node in model.nodes)


def names(tensors: list[gs.Tensor]) -> list[str]:
    return [t.name for t in tensors]


def outputs(model: gs.Graph, **feeds: Any) -> Any:
    return Session(model_from_graph(model), threads=1).run(feeds)


def every(dtype: str) -> Any:
    """All integers of a type; of 16 bits, the ends and some between."""
    info = np.iinfo(dtype)
    if info.bits == 8:
        return np.arange(info.min, info.max + 1, dtype=dtype)
    return np.linspace(info.min, info.max, 3001).astype(dtype)


@law
@given(st.data(), GRID_NAMES, GRID_NAMES)
def test_a_pair_becomes_a_requantisation(data: st.DataObject, x_type: str, y: str) -> None:
    xz, yz = (
        np.asarray(data.draw(st.integers(np.iinfo(t).min, np.iinfo(t).max)), t) for t in (x_type, y)
    )
    xs, ys = (np.float32(data.draw(st.floats(2.0**-10, 0.25, width=32))) for _ in range(2))
    constants = {"xs": xs, "ys": ys, "xz": xz, "yz": yz}
    model = graph(f"{x_type}[n] x", f"{y}[n] q", PAIR, **constants)
    assert lower(model) == 1
    assert prove(model) == []
    grid, centred = GRIDS[y], every(x_type).astype(np.int64) - int(xz)
    factor = dyadic(float(xs) / float(ys), 62 - grid.bits)
    expected = requantize(centred, factor, zero_point=int(yz), low=grid.low, high=grid.high)
    np.testing.assert_array_equal(outputs(model, x=every(x_type))["q"], expected)


def test_pairs_with_one_grid_go() -> None:
    body = """p = QuantizeLinear(x, xs, xz) a = DequantizeLinear(p, xs, xz)
        b = QuantizeLinear(a, xs, xz) y = DequantizeLinear(b, xs, xz)"""
    model = net(body)
    x = np.linspace(-3, 6, 1000, dtype=np.float32)
    before = outputs(model, x=x)["y"]
    assert lower(model) == 1
    assert ops(model) == ["DequantizeLinear", "QuantizeLinear"]
    np.testing.assert_array_equal(outputs(model, x=x)["y"], before)
    assert json.loads(metadata(model)[GRIDS_KEY]).keys() == {"p"}


def test_integer_inputs_and_outputs_keep_their_names() -> None:
    model = graph("uint8[n] x", "int8[n] q", PAIR)
    lower(model)
    assert (names(model.inputs), names(model.outputs)) == (["x"], ["q"])
    body = "a = DequantizeLinear(x, xs, xz) q = QuantizeLinear(a, xs, xz)"
    model = graph("uint8[n] x", "uint8[n] q", body)
    assert lower(model) == 1
    assert (names(model.inputs), names(model.outputs)) == (["x"], ["q"])
    x = every("uint8")
    np.testing.assert_array_equal(outputs(model, x=x)["q"], x)


def test_floats_within_half_up_of_the_model_before() -> None:
    model, x = net(), np.linspace(-3, 6, 2000, dtype=np.float32)
    before = outputs(model, x=x)["y"]
    lower(model)
    proof = examine(model_from_graph(model))
    assert (proof.findings, proof.quantizers, proof.dequantizers) == ((), 1, 1)
    moved = np.abs(outputs(model, x=x)["y"] - before)
    # 0.02 in steps of 0.05: no multiple is a tie but every fifth, which floats round to even.
    assert moved.max() <= YS * (1 + 1e-5)
    assert (moved > 0).mean() <= 0.2


def test_int8_takes_and_gives_the_integers() -> None:
    model, x = net(), np.linspace(-3, 6, 2000, dtype=np.float32)
    assert lower(model, io="int8") == 3
    assert (names(model.inputs), names(model.outputs)) == (["x"], ["y"])
    assert [t.dtype for t in (*model.inputs, *model.outputs)] == [np.uint8, np.int8]
    proof = examine(model_from_graph(model))
    assert (proof.findings, proof.quantizers, proof.dequantizers) == ((), 0, 0)
    assert json.loads(metadata(model)[GRIDS_KEY]) == {"x": ["x", *GRIDS_OF_NET["p"][1:]]} | {
        "y": ["y", *GRIDS_OF_NET["b"][1:]]
    }
    float_io = net()
    lower(float_io)
    found = RealSession(model_from_graph(model)).run({"x": x})["y"]
    np.testing.assert_array_equal(found, outputs(float_io, x=x)["y"])


SHARED = """p = QuantizeLinear(x, xs, xz)
    y = DequantizeLinear(p, xs, xz) z = DequantizeLinear(p, xs, xz)"""
TWICE = """p = QuantizeLinear(x, xs, xz) a = DequantizeLinear(p, xs, xz)
    b = QuantizeLinear(a, ys, yz) y = DequantizeLinear(b, ys, yz) z = DequantizeLinear(b, ys, yz)"""
LENGTHS = """p = QuantizeLinear(x, xs, xz) a = DequantizeLinear(p, xs, xz)
    b = QuantizeLinear(a, ys, yz) y = DequantizeLinear(b, ys, yz) z = Add(n, n)"""
TOGETHER = [
    (SHARED, "float[n] x", "float[n] y, float[n] z"),
    (TWICE, "float[n] x", "float[n] y, float[n] z"),
    (LENGTHS, "float[n] x, int64[1] n, float[n] unread", "float[n] y, int64[1] z"),
]


@pytest.mark.parametrize(("body", "inputs", "results"), TOGETHER)
def test_int8_with_several_outputs(body: str, inputs: str, results: str) -> None:
    model, before = net(body, inputs, results), net(body, inputs, results)
    lower(model, io="int8")
    lower(before)
    proof = examine(model_from_graph(model))
    assert (proof.findings, proof.quantizers, proof.dequantizers) == ((), 0, 0)
    assert names(model.inputs) == names(before.inputs)
    assert names(model.outputs) == ["y", "z"]
    x = np.linspace(-3, 6, 20, dtype=np.float32)
    feeds = {"x": x} | ({"n": np.array([3]), "unread": x} if "unread" in inputs else {})
    found = RealSession(model_from_graph(model)).run(feeds)
    for name, values in outputs(before, **feeds).items():
        np.testing.assert_array_equal(found[name], values)


def test_copies_need_no_record() -> None:
    model = graph("float[n] x", "float[n] y, float[n] z", SHARED)
    lower(model, io="int8")
    assert names(model.outputs) == ["y", "z"]
    assert json.loads(metadata(model)[GRIDS_KEY]) == {}


def test_outputs_that_are_read_again_or_integer_are_left() -> None:
    body = """p = QuantizeLinear(x, xs, xz) y = DequantizeLinear(p, xs, xz)
        b = Relu(y) q = QuantizeLinear(b, ys, yz)"""
    model = net(body, outputs="float[n] y, int8[n] q")
    assert lower(model, ("Relu",), io="int8") == 1
    assert [node.op for node in model.nodes] == ["DequantizeLinear", "Relu", "QuantizeLinear"]
    read = "p = QuantizeLinear(x, xs, xz) y = DequantizeLinear(p, xs, xz) z = Relu(x)"
    model = net(read, outputs="float[n] y, float[n] z")
    assert lower(model, ("Relu",), io="int8") == 1
    assert ops(model) == ["QuantizeLinear", "Relu"]
    several = """p = QuantizeLinear(x, xs, xz) y = DequantizeLinear(p, xs, xz)
        b = QuantizeLinear(x, ys, yz) z = DequantizeLinear(b, ys, yz)"""
    model = net(several, outputs="float[n] y, float[n] z")
    assert lower(model, io="int8") == 2
    assert ops(model) == ["QuantizeLinear"] * 2


def test_quantizers_of_floats_and_in_bodies_are_left_to_the_prover() -> None:
    body = """p = QuantizeLinear(x, xs, xz) a = DequantizeLinear(p, xs, xz)
        y = If(k) <then_branch = t () => (float[2] s) {
            r = QuantizeLinear(a, ys, yz) s = DequantizeLinear(r, ys, yz) },
          else_branch = e () => (float[2] u) { u = Relu(a) }>"""
    model = net(body, "float[2] x, bool k", "float[2] y")
    assert lower(model, ("If",)) == 0
    assert any(found.node == "If_2" for found in prove(model))
    model = net(NET.replace("b = QuantizeLinear(a", "f = Relu(a) b = QuantizeLinear(f"))
    assert lower(model, ("Relu",)) == 0
    assert "Relu" in ops(model)


def test_what_is_gone_is_forgotten() -> None:
    model = net()
    recorded = GRIDS_OF_NET | {"gone": ["g", 1.0, 0]}
    metadata(model)[GRIDS_KEY] = json.dumps(recorded)
    lower(model)
    assert json.loads(metadata(model)[GRIDS_KEY]) == GRIDS_OF_NET


def test_errors_are_told() -> None:
    with pytest.raises(PassError, match="io 'int4'; expected 'float' or 'int8'"):
        lower(net(), io="int4")
    model = graph("uint8[n] x", "int8[n] q", PAIR, xs=np.float32(1e20))
    with pytest.raises(PassError, match=r"integerize_boundary: a requantisation by .*calibrate"):
        lower(model)
    model = net()
    metadata(model)[GRIDS_KEY] = "[1]"
    with pytest.raises(IntqError, match=r"metadata onnx_intq.grids cannot be read .*; quantize"):
        lower(model)
