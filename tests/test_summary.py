"""What is counted as quantized."""

import onnx

from onnx_intq.graph import graph_from_model
from onnx_intq.summary import (
    describe_float,
    describe_nothing,
    describe_remaining,
    quantized_nodes,
)

PAIRS = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2, 2] x, int8[2, 2] stored) => (float[2, 2] y, float[2, 2] z)
    <float s = {0.1}, int8 o = {0}, int8[2, 2] w = {1, 2, 3, 4}> {
        q = QuantizeLinear(x, s, o)
        d = DequantizeLinear(q, s, o)
        v = DequantizeLinear(w, s, o)
        product = MatMul(d, v)
        sum = Add(product, d)
        y = Relu(sum)
        z = MatMul(x, v)
    }"""


def test_nodes_that_read_quantized_activations_count() -> None:
    graph = graph_from_model(onnx.parser.parse_model(PAIRS))
    # The last product has integer weights alone, the activation is float.
    assert quantized_nodes(graph, ()) == {"Add": 1, "MatMul": 1}
    (add,) = (node.name for node in graph.nodes if node.op == "Add")
    assert quantized_nodes(graph, {add}) == {"MatMul": 1}


def test_products_of_integers_count() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (uint8[1, 2, 4] x, uint8[2, 2, 1] w, uint8[4, 3] v) => (int32[1, 2, 3] y, int64[3] n) {
            c = ConvInteger(x, w)
            b = Cast<to = 2>(c)
            y = MatMulInteger(b, v)
            n = Shape(y)
        }"""
    graph = graph_from_model(onnx.parser.parse_model(text))
    assert quantized_nodes(graph, ()) == {"ConvInteger": 1, "MatMulInteger": 1}


def test_lines_name_the_first_and_count_the_rest() -> None:
    assert describe_float([("a", "why")]) == (
        "'a' has no integer form: why; expected none to stay float; "
        "let them stay with --allow-float"
    )
    assert "'a' has no integer form (and 1 more): why" in describe_float([("a", "why")] * 2)
    assert describe_remaining([("a", "why")]).startswith(
        "BatchNormalization 'a' cannot be folded: why; expected none to stay"
    )
    assert "'a' cannot be folded (and 2 more): why" in describe_remaining([("a", "why")] * 3)
    assert "nothing was quantized (a: why); expected" in describe_nothing([("a", "why")])
    assert "(the model: it has none of these operators)" in describe_nothing([])
