from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.grid import dyadic, requantize
from onnx_intq.integer_only import prove
from onnx_intq.lowering import GRIDS
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

IntegerizeCast = load("integerize_cast")
law = settings(max_examples=60, deadline=None)
CAST = "c = Cast<to = 1>(x)"


def graph(x: str, y: str, ys: float, yz: int, body: Any = CAST, **more: Any) -> gs.Graph:
    """A cast of x, whose result c is quantized to `y`."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g ({x}[n] x) => ({y}[n] q) {{
            {body} q = QuantizeLinear(c, ys, yz)
        }}"""
    )
    for name, values in ({"ys": np.float32(ys), "yz": np.asarray(yz, y)} | more).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def lower(model: gs.Graph) -> list[str]:
    """Lower; doing so again must change nothing. Returns why something remains."""
    ctx = Context(facts={"complete"})
    first, second = run(model, [IntegerizeCast()] * 2, ctx, [well_formed])
    assert second.changes == 0
    assert second.skipped == first.skipped
    assert first.changes + len(first.skipped) == 1
    assert ctx.remaining == ctx.skipped
    return [why for _, why in first.skipped]


def outputs(model: gs.Graph, **feeds: Any) -> Any:
    (result,) = Session(model_from_graph(model), threads=1).run(feeds).values()
    return result


@pytest.mark.parametrize("y", GRIDS)
@pytest.mark.parametrize("scale", [1 / 127, 1 / 255, 0.3, 3.0])
def test_truth_becomes_the_integers_of_one_and_zero(y: str, scale: float) -> None:
    model, before = graph("bool", y, scale, 5), graph("bool", y, scale, 5)
    assert lower(model) == []
    assert prove(model) == []
    assert [n.op for n in model.nodes] == (["Where"] if "8" in y else ["Where", "Cast"])
    x = np.array([True, False, True])
    np.testing.assert_array_equal(outputs(model, x=x), outputs(before, x=x))


INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"]


@law
@given(
    st.sampled_from(INTEGERS),
    st.sampled_from(sorted(GRIDS)),
    st.floats(1e-3, 1e3),
    st.data(),
)
def test_integers_are_requantised(x_type: str, y: str, scale: float, data: st.DataObject) -> None:
    limits, grid = np.iinfo(x_type), GRIDS[y]
    zero = data.draw(st.integers(grid.low, grid.high))
    model = graph(x_type, y, scale, zero)
    assert lower(model) == []
    assert prove(model) == []
    near = st.integers(max(limits.min, -1000), min(limits.max, 1000))
    x = np.array([limits.min, limits.max, 0, *data.draw(st.lists(near))], x_type)
    reach = np.clip(x.astype(object), -(1 << 30), 1 << 30).astype(np.int64)
    multiplier = dyadic(1 / float(np.float32(scale)), 62 - grid.bits)
    expected = requantize(reach, multiplier, zero_point=zero, low=grid.low, high=grid.high)
    np.testing.assert_array_equal(outputs(model, x=x), expected)


@pytest.mark.parametrize("scale", [0.02, 0.05])
def test_a_cast_of_floats_to_floats_moves_them(scale: float) -> None:
    body = "a = DequantizeLinear(x, xs, xz) c = Cast<to = 1>(a)"
    more = {"xs": np.float32(0.02), "xz": np.int8(3)}
    model, before = (graph("int8", "int8", scale, 3, body, **more) for _ in range(2))
    assert lower(model) == []
    assert prove(model) == []
    x = np.arange(-128, 128).astype(np.int8)
    np.testing.assert_array_equal(outputs(model, x=x), outputs(before, x=x))


def test_an_activation_limits_the_integers() -> None:
    limits = {"low": np.float32(0.25), "high": np.float32(0.75)}
    body = "r = Cast<to = 1>(x) c = Clip(r, low, high)"
    model = graph("bool", "int8", 0.01, 0, body, **limits)
    assert lower(model) == []
    assert outputs(model, x=np.array([True, False])).tolist() == [75, 25]
    model = graph("int32", "int8", 0.01, 0, body, **limits)
    assert lower(model) == []
    assert outputs(model, x=np.array([-9, 0, 1, 9], np.int32)).tolist() == [25, 25, 75, 75]


def test_declines_with_the_reason() -> None:
    body = "a = DequantizeLinear(x, xs, xz) i = Cast<to = 7>(a) c = DequantizeLinear(x, xs, xz)"
    model = graph("int8", "int8", 1, 0, body, xs=np.float32(1), xz=np.int8(0))
    model.outputs.append(model.tensors()["i"])
    (why,) = lower(model)
    assert why == "it casts floats to int64; only casts to float32 can be lowered"
    (why,) = lower(graph("double", "int8", 1, 0))
    assert why == "it casts 'x', which is neither bool nor an integer"
    (why,) = lower(graph("uint64", "int8", 1, 0))
    assert "leave the integers' range" in why


def test_a_mask_of_floats_needs_no_calibration() -> None:
    """x * Cast(mask): the product of two grids, both made by complete_qdq."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, t] x, bool[n, t] mask) => (float[n, t] y) {
            xq = QuantizeLinear(x, xs, xz) a = DequantizeLinear(xq, xs, xz)
            m = Cast<to = 1>(mask) y = Mul(a, m)
        }"""
    )
    for name, values in {"xs": np.float32(0.01), "xz": np.uint8(128)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    graph_, ctx = graph_from_model(model), Context(facts={"quantized"})
    passes = parse("complete_qdq, integerize_cast, integerize_mul")
    run(graph_, passes, ctx, [well_formed])
    assert not ctx.remaining
    assert prove(graph_) == []
    random = np.random.default_rng(0)
    x = random.uniform(-1.2, 1.2, (3, 50)).astype(np.float32)
    mask = random.random((3, 50)) > 0.5
    expected = np.clip(np.rint(x / np.float32(0.01)), -128, 127) * np.float32(0.01) * mask
    step = float(graph_.outputs[0].inputs[0].inputs[1].values)
    assert np.abs(outputs(graph_, x=x, mask=mask) - expected).max() <= step
