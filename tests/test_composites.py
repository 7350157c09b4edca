from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.composites import arguments, attention, gate, gates, gates_itself, swish
from onnx_intq.graph import graph_from_model


def graph(body: str, outputs: str = "float[n, 4] y") -> gs.Graph:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[n, 4] x, float[4, 4] v, uint8[n, 4] q) => ({outputs}) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    constants: dict[str, Any] = {"k": np.float32(0.1), "k2": np.float32(0.2), "o": np.uint8(0)}
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return graph_from_model(model)


def node(model: gs.Graph, op: str) -> gs.Node:
    return next(n for n in model.nodes if n.op == op)


DEQUANTIZED = "a = DequantizeLinear(q, k, o) b = DequantizeLinear(q, {scale}, o) "
SWISHES = {
    "s = Sigmoid(x) y = Mul(x, s)": True,
    "s = Sigmoid(x) y = Mul(s, x)": True,
    DEQUANTIZED.format(scale="k") + "s = Sigmoid(a) y = Mul(b, s)": True,
    DEQUANTIZED.format(scale="k2") + "s = Sigmoid(a) y = Mul(b, s)": False,
    "s = Sigmoid(x) y = Mul(s, s)": False,
    "s = Tanh(x) y = Mul(x, s)": False,
    "n = Neg(x) s = Sigmoid(x) y = Mul(n, s)": False,
    "s = Sigmoid(x) m = Mul(x, s) y = Add(m, s)": False,
    "s = Sigmoid(x) p = QuantizeLinear(s, k, o) d = DequantizeLinear(p, k, o) y = Mul(x, d)": False,
}


@pytest.mark.parametrize("body", SWISHES)
def test_a_swish_is_a_product_with_its_own_sigmoid(body: str) -> None:
    model = graph(body)
    product, gate = node(model, "Mul"), [n for n in model.nodes if n.op == "Sigmoid"]
    assert swish(product) is (gate[0] if SWISHES[body] else None)
    assert [gates_itself(n, model) for n in gate] == [SWISHES[body]] * len(gate)
    assert not gates_itself(product, model)
    assert all(swish(n) is None for n in gate)


def test_an_output_of_the_graph_is_read_by_its_user() -> None:
    model = graph("s = Sigmoid(x) y = Mul(x, s)", "float[n, 4] y, float[n, 4] s")
    assert not gates_itself(node(model, "Sigmoid"), model)


GATED = {
    "n = Neg(x) s = Sigmoid(x) y = Mul(n, s)": ["n", "x"],
    "n = Neg(x) s = Sigmoid(n) y = Mul(s, x)": ["x", "n"],
    "s = Sigmoid(x) y = Mul(x, s)": ["x", "x"],
    "s = Sigmoid(x) y = Mul(s, k)": None,
    "n = Neg(x) s = Sigmoid(x) m = Mul(n, s) y = Add(m, s)": None,
    "s = Sigmoid(x) n = Neg(s) y = Mul(x, n)": None,
    "s = Sigmoid(x) y = Add(x, s)": None,
}


@pytest.mark.parametrize("body", GATED)
def test_a_gated_product_is_a_function_of_two(body: str) -> None:
    model, wanted = graph(body), GATED[body]
    sigmoid = node(model, "Sigmoid")
    product = next(n for n in model.nodes if n.op in {"Mul", "Add"})
    assert gate(product) is (None if wanted is None else sigmoid)
    assert gates(sigmoid, model) == (wanted is not None)
    named = [t.name for t in arguments(product)]
    assert named == (wanted or [t.name for t in product.inputs])


PAIR = "p = QuantizeLinear(s, k, o) w = DequantizeLinear(p, k, o)"
ATTENTIONS = {
    "w = Softmax(x) y = MatMul(w, v)": True,
    f"s = Softmax(x) {PAIR} y = MatMul(w, v)": True,
    f"s = Softmax(x) {PAIR} m = MatMul(w, v) y = Add(m, w)": False,
    f"s = Softmax(x) {PAIR} m = MatMul(w, v) y = Add(m, s)": False,
    f"s = Tanh(x) {PAIR} y = MatMul(w, v)": False,
    "w = Softmax(x) y = MatMul(v, w)": False,
    "w = DequantizeLinear(q, k, o) y = MatMul(w, v)": False,
    "y = MatMul(x, v)": False,
}


@pytest.mark.parametrize("body", ATTENTIONS)
def test_attention_is_a_product_of_a_softmax_that_nothing_else_reads(body: str) -> None:
    model = graph(body)
    found = attention(node(model, "MatMul"))
    assert (found is not None) == ATTENTIONS[body]
    assert found is None or found.op == "Softmax"
