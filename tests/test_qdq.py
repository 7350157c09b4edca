import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq import qdq
from onnx_intq.graph import graph_from_model

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[2, 4] x) => (float[4, 2] y)
    <float s = {0.5}, int8 z = {-3}, float[2] many = {1, 2}, int8[2] zeros = {0, 0},
     int8[2, 4] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2, 4] f = {1, 2, 3, 4, 5, 6, 7, 8}> {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        v = DequantizeLinear<axis = 0>(w, many, zeros)
        p = QuantizeLinear(f, s)
        e = DequantizeLinear(p, s)
        a = Add(d, v)
        b = Add(a, e)
        t = Transpose<perm = [1, 0]>(d)
        y = Identity(t)
    }"""


@pytest.fixture
def graph() -> gs.Graph:
    return graph_from_model(onnx.parser.parse_model(TEXT))


def test_a_pair_is_read(graph: gs.Graph) -> None:
    q, d = list(graph.nodes)[:2]
    result = d.outputs[0]
    assert qdq.scale(d) == np.float32(0.5)
    assert qdq.zero_point(d) == -3
    assert qdq.integer_type(q) == qdq.integer_type(d) == "int8"
    assert qdq.quantizer(d) is q
    assert qdq.dequantizer(result) is d
    assert qdq.pair(result) is q
    assert qdq.repeats(d)
    assert not qdq.repeats(q)
    assert not qdq.holds_weight(q)
    assert not qdq.holds_weight(d)
    assert not qdq.per_channel(d)


def test_weights_are_stored_integers_or_floats_quantized_in_place(graph: gs.Graph) -> None:
    _, _, stored, q, d, *_ = graph.nodes
    assert qdq.holds_weight(stored)
    assert qdq.per_channel(stored)
    assert qdq.quantizer(stored) is None
    assert qdq.pair(stored.outputs[0]) is None
    assert qdq.holds_weight(q)
    assert qdq.holds_weight(d)
    assert qdq.zero_point(d) is None
    assert qdq.repeats(d)


def test_types_without_a_zero_point_are_those_of_onnx(graph: gs.Graph) -> None:
    _, first, stored, q, d, *_ = graph.nodes
    assert qdq.integer_type(q) == qdq.integer_type(d) == "uint8"
    q.attrs["output_dtype"] = onnx.TensorProto.INT16
    d.inputs[0].dtype = None
    assert qdq.integer_type(q) == qdq.integer_type(d) == "int16"
    del stored.inputs[2]
    assert qdq.integer_type(stored) == "int8"
    first.inputs[0] = gs.Variable("unknown")
    del first.inputs[2]
    assert qdq.integer_type(first) == ""
    assert not qdq.repeats(first)


def test_moved_values_are_followed_on_request(graph: gs.Graph) -> None:
    transposed = graph.nodes[-2].outputs[0]
    assert qdq.dequantizer(transposed) is None
    assert qdq.dequantizer(transposed, moved=True) is graph.nodes[1]
    assert qdq.dequantizer(graph.inputs[0], moved=True) is None
    assert qdq.dequantizer(graph.outputs[0], moved=True) is None


def test_types_have_names_even_where_numpy_lacks_them() -> None:
    assert qdq.type_name(gs.Variable("x")) == ""
    assert qdq.type_name(gs.Variable("x", np.float32)) == "float32"
    assert qdq.type_name(gs.Variable("x", onnx.TensorProto.FLOAT8E4M3FN)) == "float8e4m3fn"


def test_nodes_are_found_in_bodies() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (bool c, float[2] x) => (float[2] y) {
        y = If(c) <then_branch = t () => (float[2] p) { p = Sin(x) },
                   else_branch = e () => (float[2] q) { q = Cos(x) }>
    }"""
    graph = graph_from_model(onnx.parser.parse_model(text))
    assert [node.op for node in qdq.nodes(graph)] == ["If", "Sin", "Cos"]
    assert [node.op for node in qdq.nodes(graph, "Cos", "If")] == ["If", "Cos"]
