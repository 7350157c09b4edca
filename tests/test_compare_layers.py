from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.compare_layers import CutGraph, describe, layer
from onnx_intq.compare_tensors import view
from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.runtime import Session

HEADER = '<ir_version: 10, opset_import: ["" : 21]> net '
RESIDUAL = """(float[n,4] x) => (float[n,4] y)
    <float[4,4] w = {1,0,2,0, 0,1,0,1, 3,0,1,0, 0,2,0,1}, float s = {0.5}, int8 z = {1}> {
        xq = QuantizeLinear(x, s, z)   xd = DequantizeLinear(xq, s, z)
        a = MatMul(xd, w)
        b = Relu(a)
        c = Add(b, xd)
        cq = QuantizeLinear(c, s, z)   cd = DequantizeLinear(cq, s, z)
        e = Neg(c)
        y = Mul(cd, e)
    }"""
BRANCH = """(float[4] x, bool take) => (float[4] y) {
        a = Abs(x)
        b = Neg(a)
        c = If(take) <
            then_branch = yes () => (float[4] t) { u = Add(a, b) t = Add(u, x) },
            else_branch = no () => (float[4] e) { e = Neg(b) }
        >
        y = Relu(c)
    }"""


def graph(text: str) -> gs.Graph:
    return graph_from_model(onnx.parser.parse_model(HEADER + text))


def everything(net: gs.Graph, feeds: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of the whole graph."""
    whole = net.copy()
    whole.outputs = [t for node in whole.nodes for t in node.outputs]
    return feeds | Session(model_from_graph(whole), threads=1, optimize=False).run(feeds)


@pytest.mark.parametrize(
    ("text", "feeds"),
    [
        (RESIDUAL, {"x": np.arange(8, dtype=np.float32).reshape(2, 4) - 3}),
        (BRANCH, {"x": np.array([-1, 2, -3, 4], np.float32), "take": np.array(True)}),
        (BRANCH, {"x": np.array([-1, 2, -3, 4], np.float32), "take": np.array(False)}),
    ],
)
def test_on_the_graphs_own_values_the_layers_make_them_again(
    text: str, feeds: dict[str, Any]
) -> None:
    net = graph(text)
    shared = view(net).readings
    before = model_from_graph(net).SerializeToString(deterministic=True)
    known = everything(net, feeds)
    tensors = [r.tensor for r in shared if r.tensor not in feeds]
    cut = CutGraph(net, shared)
    for chosen in (tensors, tensors[-1:], tensors[::2]):
        part = cut.part(chosen, threads=1)
        made = part.run({name: known[name] for name in part.inputs})
        assert set(made) == set(chosen)
        for name, values in made.items():
            np.testing.assert_array_equal(values, known[name])
    assert model_from_graph(net).SerializeToString(deterministic=True) == before


def test_a_layer_reads_what_it_is_given() -> None:
    net = graph(RESIDUAL)
    part = CutGraph(net, view(net).readings).part(["a"], threads=1)
    assert part.inputs == ("xq",)
    made = part.run({"xq": np.array([[3, 1, 1, 1]], np.int8)})
    np.testing.assert_array_equal(made["a"], [[1, 0, 2, 0]])


def test_putting_a_tensor_on_its_grid_belongs_to_the_layer_that_makes_it() -> None:
    net = graph(RESIDUAL)
    cut = CutGraph(net, view(net).readings)
    # c is read in float, too: both c and its integers are shared, and are made of the same inputs.
    for tensor in ("c", "cq"):
        assert set(cut.layer(tensor).inputs) == {"b", "xq"}
    assert cut.layer("c").operators == ("Add",)
    assert set(cut.layer("e").inputs) == {"c"}
    assert set(cut.layer("y").inputs) == {"e", "cq"}


def test_a_quantized_output_of_another_name_is_a_layer_of_its_own() -> None:
    net = graph("""(float[4] x) => (float[4] y, float[4] o) <float s = {0.5}, int8 z = {1}> {
        c = Neg(x)   q = QuantizeLinear(c, s, z)   y = DequantizeLinear(q, s, z)   o = Abs(c)
    }""")
    found = CutGraph(net, view(net).readings).layer("q")
    assert (found.inputs, found.operators) == (("c",), ("QuantizeLinear",))


def test_layers_know_their_nodes_and_operators() -> None:
    net = graph(RESIDUAL)
    tensors = {t.name: t for node in net.nodes for t in node.outputs}
    found = layer(tensors["cd"], {"x"})
    assert found.operators == ("MatMul", "Relu", "Add")
    assert found.inputs == ("x",)
    assert len(found.nodes) == 7
    assert layer(tensors["xq"], {"x"}).operators == ("QuantizeLinear",)
    inner = layer(graph(BRANCH).outputs[0], {"a", "b"})
    assert (inner.operators, set(inner.inputs)) == (("If", "Relu"), {"a", "b"})


def test_long_layers_are_called_after_their_product() -> None:
    assert describe(["Conv"]) == "Conv"
    assert describe(["Conv", "BatchNormalization", "Relu"]) == "Conv+BatchNormalization+Relu"
    assert describe(["Cast", "ConvInteger", "Mul", "Cast"]) == "ConvInteger and 3 more"
    assert describe(["Cast", "Mul", "Add", "Div"]) == "Div and 3 more"
