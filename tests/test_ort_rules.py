import numpy as np
import onnx
import pytest

from onnx_intq.check import check
from onnx_intq.graph import graph_from_model
from onnx_intq.runtime import Session
from onnx_intq.transform import IntqError


def model(ir_version: int = 10, opset: int = 21, dtype: int = onnx.TensorProto.UINT8) -> bytes:
    proto = onnx.parser.parse_model(
        f"""<ir_version: {ir_version}, opset_import: ["" : {opset}]>
        g (float[4] x) => (float[4] y) <float s = {{0.5}}> {{
            q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)
        }}"""
    )
    proto.graph.initializer.append(onnx.helper.make_tensor("z", dtype, [], [0]))
    return bytes(proto.SerializeToString())


def loads(content: bytes) -> bool:
    try:
        Session(content)
    except IntqError:
        return False
    return True


TYPES = ["UINT8", "INT8", "INT16", "UINT16", "INT4", "UINT4", "INT2", "FLOAT8E4M3FN", "FLOAT4E2M1"]


@pytest.mark.parametrize("opset", [13, 19, 21, 25])
@pytest.mark.parametrize("dtype", TYPES)
def test_types_and_opsets_are_those_that_onnxruntime_loads(dtype: str, opset: int) -> None:
    content = model(13, opset, onnx.TensorProto.DataType.Value(dtype))
    found = check(graph_from_model(onnx.load_from_string(content)), "ort")
    assert {p.rule for p in found} == (set() if loads(content) else {"type-opset"})
    assert [p.node for p in found] == ["QuantizeLinear_0"] * len(found)


@pytest.mark.parametrize("ir_version", [12, 13, 14])
@pytest.mark.parametrize("opset", [25, 26, 27])
def test_versions_are_those_that_onnxruntime_loads(ir_version: int, opset: int) -> None:
    content = model(ir_version, opset)
    found = check(graph_from_model(onnx.load_from_string(content)), "ort")
    expected = {"ir-version": ir_version > 13, "opset": opset > 26}
    assert {p.rule for p in found} == {rule for rule, broken in expected.items() if broken}
    assert any(expected.values()) != loads(content)


def test_operators_of_onnxruntimes_own_domain_have_no_opset() -> None:
    proto = onnx.load_from_string(model(8, 17, onnx.TensorProto.UINT16))
    proto.opset_import.add(domain="com.microsoft", version=1)
    for node in proto.graph.node:
        node.domain = "com.microsoft"
    assert loads(proto.SerializeToString())
    graph = graph_from_model(proto)
    assert np.dtype(graph.nodes[0].inputs[2].dtype) == np.uint16
    assert check(graph, "ort") == []
