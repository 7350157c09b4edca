import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.runtime import Session
from onnx_intq.scalar_functions import (
    LONGEST,
    UNARY,
    above,
    between,
    composed,
    evaluate,
    function,
    variable,
)

X = np.linspace(-4, 4, 161)
REAL: dict[str, Callable[[Any], Any]] = {
    "Gelu": lambda x: 0.5 * x * np.vectorize(math.erfc)(-x / math.sqrt(2)),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Erf": np.vectorize(math.erf),
    "Tanh": np.tanh,
    "Elu": lambda x: np.where(x < 0, np.expm1(x), x),
    "Softsign": lambda x: x / (1 + np.abs(x)),
    "Softplus": lambda x: np.log1p(np.exp(x)),
    "Mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "Atan": np.arctan,
    "Round": np.rint,
    "Sqrt": lambda x: np.sqrt(np.maximum(x, 0)),
    "Log": lambda x: np.log(np.maximum(x, 0)),
}


def graph(body: str, **constants: Any) -> gs.Graph:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[n, 6] x, float[n, 6] z) => (float[n, 6] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    for name, values in constants.items():
        tensor = onnx.numpy_helper.from_array(np.asarray(values, np.float32), name)
        model.graph.initializer.append(tensor)
    return graph_from_model(model)


@pytest.mark.parametrize("op", sorted(REAL))
def test_operators_are_computed_in_float64(op: str) -> None:
    assert op in UNARY
    with np.errstate(divide="ignore"):
        expected = REAL[op](X)
    np.testing.assert_allclose(
        function(graph(f"y = {op}(x)").nodes[0])(X), expected, rtol=1e-14, atol=1e-15
    )


@pytest.mark.parametrize("op", sorted(UNARY - {"Swish"}))
def test_every_operator_is_as_onnxruntime_computes_it(op: str) -> None:
    model = graph(f"y = {op}(x)")
    x = (X[:160] / (5 if op in {"Asin", "Acos", "Atanh"} else 1)).reshape(-1, 6 - 1)[:32]
    x = np.resize(np.abs(x) + 1 if op == "Acosh" else x, (20, 6)).astype(np.float32)
    x = np.maximum(x, 0) if op in {"Sqrt", "Log"} else x
    (found,) = Session(model_from_graph(model), threads=1).run({"x": x, "z": x}).values()
    with np.errstate(divide="ignore"):
        expected = function(model.nodes[0])(x.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=3e-6)


def test_gelu_by_tanh() -> None:
    (node,) = graph('y = Gelu<approximate = "tanh">(x)').nodes
    exact, found = REAL["Gelu"](X), function(node)(X)
    assert 4e-4 < np.abs(found - exact).max() < 4.8e-4


def test_constants_are_part_of_a_function() -> None:
    (node,) = graph("y = Pow(k, x)", k=[2.0]).nodes
    assert variable(node) == 1
    np.testing.assert_array_equal(function(node)(X), np.exp2(X))
    assert variable(graph("y = Pow(x, z)").nodes[0]) is None
    assert variable(graph("y = Pow(x, k)", k=[1.0, 2, 3, 4, 5, 6]).nodes[0]) is None
    assert variable(graph("y = Exp(k)", k=np.ones(6)).nodes[0]) is None
    assert variable(graph("y = Exp(x)").nodes[0]) == 0


def test_optional_inputs_may_be_left_out() -> None:
    (node,) = graph("y = Clip(x, , k)", k=1.0).nodes
    np.testing.assert_array_equal(evaluate(node, [X, None, np.array(1.0)]), np.minimum(X, 1))


def test_a_chain_is_computed_from_where_it_starts() -> None:
    model = graph("a = Neg(x) e = Exp(a) c = Clip(e, , k) p = Add(c, k) y = Div(a, p)", k=1.0)
    tensors = model.tensors()
    a, y = tensors["a"], tensors["y"]
    assert [t.name for t in above(y)] == ["a", "p", "x", "c", "e"]
    found = between(y, a)
    assert found is not None
    assert {node.op for node in found} == {"Exp", "Clip", "Add", "Div"}
    np.testing.assert_allclose(composed(y, a, X), X / (np.minimum(np.exp(X), 1) + 1), rtol=1e-15)
    assert between(y, tensors["e"]) is None  # reads a, too
    assert between(y, tensors["z"]) is None
    assert between(y, y) == []
    found = between(y, tensors["x"])
    assert found is not None
    assert len(found) == 5  # one of them is read twice


@pytest.mark.parametrize("body", ["a = Identity(x) y = Exp(a)", "a = Add(x, k) y = Exp(a)"])
def test_a_chain_is_of_elementwise_operators_and_scalars(body: str) -> None:
    tensors = graph(body, k=np.ones(6)).tensors()
    assert between(tensors["y"], tensors["x"]) is None


def test_chains_have_a_longest() -> None:
    def chain(length: int) -> dict[str, gs.Tensor]:
        nodes = " ".join(f"t{i + 1} = Neg(t{i})" for i in range(1, length - 1))
        found: dict[str, gs.Tensor] = graph(f"t1 = Neg(x) {nodes} y = Neg(t{length - 1})").tensors()
        return found

    tensors = chain(LONGEST)
    assert len(between(tensors["y"], tensors["x"]) or []) == LONGEST
    tensors = chain(LONGEST + 1)
    assert between(tensors["y"], tensors["x"]) is None
    tensors = chain(100)
    assert len(above(tensors["y"])) < 2 * LONGEST + 1
