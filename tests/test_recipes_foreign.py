"""Models quantized by onnxruntime's own tool become integers, too."""

from typing import Any

import numpy as np
import onnx
import pytest

from onnx_intq.graph import model_from_graph
from onnx_intq.integer_only import prove
from onnx_intq.recipes import pipeline
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

FOREIGN = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 4, t] x) => (float[n, t, 3] y) {
        c1 = Conv<group = 4, pads = [1, 1]>(x, w1, b1) r1 = Relu(c1)
        c2 = Conv(r1, w2, b2) c3 = Conv<pads = [2, 2], dilations = [2]>(r1, w3, b3)
        s = Add(c2, c3) r2 = Clip(s, low, high)
        l = Conv(r2, w4, b4) m = MaxPool<kernel_shape = [3], pads = [1, 1]>(l)
        y = Transpose<perm = [0, 2, 1]>(m)
    }"""
SHAPES: dict[str, Any] = {
    "w1": (4, 1, 3),
    "b1": 4,
    "w2": (6, 4, 1),
    "b2": 6,
    "w3": (6, 4, 3),
    "b3": 6,
}
SHAPES |= {"w4": (3, 6, 1), "b4": 3}


def foreign_model() -> onnx.ModelProto:
    proto, random = onnx.parser.parse_model(FOREIGN), np.random.default_rng(0)
    constants = {name: random.standard_normal(shape) / 2 for name, shape in SHAPES.items()}
    for name, values in (constants | {"low": np.zeros(()), "high": np.full((), 6.0)}).items():
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), name)
        proto.graph.initializer.append(tensor)
    return proto


CHOICES: list[dict[str, Any]] = [
    {"activation_type": "QUInt8", "weight_type": "QUInt8"},
    {"activation_type": "QUInt8", "weight_type": "QUInt8", "per_channel": True},
    {"activation_type": "QUInt8", "weight_type": "QInt8"},
    {"activation_type": "QInt8", "weight_type": "QInt8"},
    {"activation_type": "QInt8", "weight_type": "QInt8", "per_channel": True},
    {"extra_options": {"ActivationSymmetric": True}},
    {"extra_options": {"DedicatedQDQPair": True}},
    {"extra_options": {"QuantizeBias": False}},
    {"extra_options": {"AddQDQPairToWeight": True}},
    {"extra_options": {"AddQDQPairToWeight": True}, "per_channel": True},
    {"op_types_to_quantize": ["Conv"]},
    {"reduce_range": True},
]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("cpu", ["any", "vnni"])
def test_another_tools_model_is_lowered(foreign: Any, choice: dict[str, Any], cpu: str) -> None:
    types = pytest.importorskip("onnxruntime.quantization").QuantType
    named = {n: types[v] if n.endswith("_type") else v for n, v in choice.items()}
    x = np.random.default_rng(1).standard_normal((4, 4, 500)).astype(np.float32)
    model = foreign(foreign_model(), [{"x": x}], **named)
    before = Session(model_from_graph(model), threads=1).run({"x": x})["y"]
    ctx = Context(facts={"quantized"})
    run(model, pipeline("integer", quantized=True, cpu=cpu), ctx, [well_formed])
    assert ctx.remaining == []
    assert prove(model) == []
    after = Session(model_from_graph(model), threads=1).run({"x": x})["y"]
    step = float(model.outputs[0].inputs[0].inputs[1].values)
    moved = np.abs(after - before) / step
    # Only ties could differ, and what follows: a step of a tensor is a few of a later one.
    assert (moved > 0.5).mean() < 1e-3
    assert moved.max() < 6
