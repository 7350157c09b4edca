"""Matrix products that onnxruntime's quantizer made."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import model_from_graph
from onnx_intq.integer_only import prove
from onnx_intq.registry import parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

RANDOM = np.random.default_rng(0)


def ops(model: gs.Graph) -> list[str]:
    return [node.op for node in model.nodes]


def outputs(model: gs.Graph, **feeds: Any) -> Any:
    (result,) = Session(model_from_graph(model), threads=1).run(feeds).values()
    return result


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_lowers_what_onnxruntime_quantized(foreign: Any, signed: bool, per_channel: bool) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 12] x) => (float[n, 3] y) { y = Gemm<transB = 1>(x, w, b) }"""
    float_model = onnx.parser.parse_model(text)
    for name, shape in {"w": (3, 12), "b": (3,)}.items():
        values = RANDOM.standard_normal(shape).astype(np.float32)
        float_model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    x = RANDOM.standard_normal((500, 12)).astype(np.float32)
    types = pytest.importorskip("onnxruntime.quantization").QuantType
    chosen = {"weight_type": types.QInt8, "activation_type": types.QInt8} if signed else {}
    model = foreign(float_model, [{"x": x}], per_channel=per_channel, **chosen)
    before = outputs(model, x=x)
    ctx = Context(facts={"quantized"})
    run(model, parse("complete_qdq, integerize_matmul"), ctx, [well_formed])
    assert not ctx.remaining
    assert prove(model) == []
    assert ops(model)[:2] == ["QuantizeLinear", "MatMulInteger"]
    step = float(model.outputs[0].inputs[0].inputs[1].values)
    moved = np.abs(outputs(model, x=x) - before)
    assert moved.max() <= step * (1 + 1e-5)
    assert (moved > step / 2).mean() < 0.01
