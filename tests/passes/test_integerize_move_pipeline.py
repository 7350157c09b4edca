"""Moves between other operators: from complete_qdq to integers."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.calibrate import calibrate
from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.integer_only import prove
from onnx_intq.registry import parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

RANDOM = np.random.default_rng(0)
XS = np.float32(0.02)


def ops(model: gs.Graph) -> list[str]:
    return [node.op for node in model.nodes]


def outputs(model: gs.Graph, **feeds: Any) -> Any:
    results = Session(model_from_graph(model), threads=1).run(feeds)
    return tuple(results.values()) if len(results) > 1 else next(iter(results.values()))


def integers(shape: tuple[int, ...], dtype: str) -> Any:
    info = np.iinfo(dtype)
    return RANDOM.integers(info.min, info.max + 1, shape).astype(dtype)


PIPELINE = "complete_qdq, integerize_conv, integerize_matmul, integerize_move"


def completed(text: str, feeds: Any, **constants: Any) -> tuple[gs.Graph, gs.Graph]:
    """A QDQ model after `PIPELINE`, calibrated on `feeds`, and as it was before."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    constants = {"s8": np.float32(0.02), "z8": np.uint8(130)} | constants
    for name, values in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    model, before = graph_from_model(proto), graph_from_model(proto)
    ranges = calibrate(before, [feeds], threads=1).select()
    ctx = Context(facts={"quantized"}, ranges=ranges)
    run(model, parse(PIPELINE), ctx, [well_formed])
    assert not ctx.remaining
    return model, before


def test_masks_and_parts_keep_the_grid_of_their_only_source() -> None:
    """Where with 0, Concat of one tensor's parts: no requantisation, and one grid."""
    text = """(float[n, 4, t] x, bool[n, 1, t] mask) => (float[n, 4, t] y) {
        q = QuantizeLinear(x, s8, z8) a = DequantizeLinear(q, s8, z8)
        m = Where(mask, a, zero) l, r = Split<axis = 1>(m) y = Concat<axis = 1>(r, l)
    }"""
    x = RANDOM.uniform(-2, 2, (2, 4, 9)).astype(np.float32)
    feeds = {"x": x, "mask": RANDOM.random((2, 1, 9)) > 0.5}
    model, before = completed(text, feeds, zero=np.float32(0))
    assert prove(model) == []
    assert ops(model) == ["QuantizeLinear", "Where", "Split", "Concat", "DequantizeLinear"]
    np.testing.assert_array_equal(outputs(model, **feeds), outputs(before, **feeds))


def test_tensors_on_several_grids_get_one_that_holds_all() -> None:
    text = """(float[n, 2, t] x, float[n, 2, t] x2) => (float[n, 4, t] y) {
        q = QuantizeLinear(x, s8, z8) a = DequantizeLinear(q, s8, z8)
        y = Concat<axis = 1>(a, x2)
    }"""
    feeds = {
        "x": RANDOM.uniform(-2, 2, (2, 2, 9)).astype(np.float32),
        "x2": RANDOM.uniform(-7, 7, (2, 2, 9)).astype(np.float32),
    }
    model, before = completed(text, feeds)
    assert prove(model) == []
    moved = np.abs(outputs(model, **feeds) - outputs(before, **feeds))
    # Both in 16 bits: half a step of 14 / 65535 for the input, and half a step for the result.
    assert moved.max() <= 14.1 / 65535


def test_a_product_s_input_has_eight_bits_before_its_mask() -> None:
    """What a Conv reads through a Where need not have 16 bits."""
    text = """(float[n, 4, t] x, bool[n, 1, t] mask) => (float[n, 4, t] y) {
        q = QuantizeLinear(x, s8, z8) a = DequantizeLinear(q, s8, z8)
        w8 = DequantizeLinear(w, ws, wz) c = Conv(a, w8) r = Relu(c)
        m = Where(mask, r, zero) y = Conv(m, w8)
    }"""
    given_ = {"w": integers((4, 4, 1), "int8"), "ws": np.float32(0.01), "wz": np.int8(0)}
    x = RANDOM.uniform(-2, 2, (2, 4, 9)).astype(np.float32)
    feeds = {"x": x, "mask": RANDOM.random((2, 1, 9)) > 0.5}
    model, _ = completed(text, feeds, zero=np.float32(0), **given_)
    assert prove(model) == []
    (where,) = (n for n in model.nodes if "mask" in [t.name for t in n.inputs])
    assert [t.dtype for t in where.inputs[1:]] == [np.uint8, np.uint8]
    assert where.outputs[0].outputs[0].op == "ConvInteger"


def test_a_left_factor_is_unsigned_through_its_mask() -> None:
    text = """(float[n, t, 4] x, bool[n, t, 1] mask) => (float[n, t, 3] y) {
        q = QuantizeLinear(x, s8, z8) a = DequantizeLinear(q, s8, z8)
        w8 = DequantizeLinear(w, ws, wz) m = Where(mask, a, zero) y = MatMul(m, w8)
    }"""
    given_ = {"w": integers((4, 3), "int8"), "ws": np.float32(0.01), "wz": np.int8(0)}
    x = RANDOM.uniform(-2, 2, (2, 9, 4)).astype(np.float32)
    feeds = {"x": x, "mask": RANDOM.random((2, 9, 1)) > 0.5}
    model, _ = completed(text, feeds, zero=np.float32(0), **given_)
    assert prove(model) == []
    assert ops(model)[:3] == ["QuantizeLinear", "Where", "MatMulInteger"]
    assert model.nodes[2].inputs[0].dtype == np.uint8


@pytest.mark.parametrize("lost", [-np.inf, -1e9, -3.4e38, -25.0])
def test_masked_logits_stay_in_reach_of_the_grid(lost: float) -> None:
    """A softmax turns what is 24 below all others into nothing; -1e9 would take all bits."""
    text = """(float[n, t] x, bool[n, t] mask) => (float[n, t] y) {
        q = QuantizeLinear(x, s8, z8) a = DequantizeLinear(q, s8, z8)
        m = Where(mask, a, lost) s = Identity(m) y = Softmax(s)
    }"""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    constants = {"s8": np.float32(0.001), "z8": np.uint8(130), "lost": np.float32(lost)}
    for name, values in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    model, before = graph_from_model(proto), graph_from_model(proto)
    run(model, parse("complete_qdq, integerize_move"), Context(facts={"quantized"}), [well_formed])
    (softmax,) = (n for n in model.nodes if n.op == "Softmax")
    assert softmax.inputs[0].inputs[0].inputs[0].dtype == np.int16
    x = RANDOM.uniform(-0.13, 0.12, (9, 50)).astype(np.float32)
    mask = RANDOM.random((9, 50)) > 0.9
    mask[:, 0] = True
    moved = outputs(model, x=x, mask=mask) - outputs(before, x=x, mask=mask)
    # 24.3 / 65535 is the logits' step: e^(half a step) - 1, and half a step of the probabilities.
    assert np.abs(moved).max() < 24.3 / 65535
    assert np.abs(moved[~mask]).max() < 1e-5


def test_lowers_what_onnxruntime_quantized(foreign: Any) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4, 12] x) => (float[n, 12, 10] y) {
            c = Conv(x, w) p = MaxPool<kernel_shape = [2]>(c) l, r = Split<axis = 1>(p)
            j = Concat<axis = 1>(r, l) e = Pad(j, pads, fill) t = Transpose<perm = [0, 2, 1]>(e)
            y = MatMul(t, v)
        }"""
    float_model = onnx.parser.parse_model(text)
    for name, shape in {"w": (4, 4, 1), "v": (4, 10)}.items():
        values = RANDOM.standard_normal(shape).astype(np.float32)
        float_model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    more: dict[str, Any] = {"pads": np.array([0, 0, 0, 0, 0, 1]), "fill": np.float32(0)}
    for name, found in more.items():
        float_model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(found), name))
    x = RANDOM.standard_normal((30, 4, 12)).astype(np.float32)
    model = foreign(float_model, [{"x": x}])
    before, ctx = outputs(model, x=x), Context(facts={"quantized"})
    run(model, parse(PIPELINE + ", integerize_boundary"), ctx, [well_formed])
    assert not ctx.remaining
    assert prove(model) == []
    step = float(model.outputs[0].inputs[0].inputs[1].values)
    moved = np.abs(outputs(model, x=x) - before)
    assert (moved > step / 2).mean() < 0.01
