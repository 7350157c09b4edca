"""Which weights are quantized, and the LSTM's among them."""

from typing import Any

import numpy as np
import onnx
import pytest

from onnx_intq.graph import graph_from_model, metadata, model_from_graph
from onnx_intq.registry import parse
from onnx_intq.runtime import Session
from onnx_intq.summary import quantized_nodes
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed
from onnx_intq.weight_reads import activation_index, weight_indices

HIDDEN = 6
PAIR = "q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z)"


def graph(body: str, outputs: str = "float y") -> Any:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[t, 2, 5] x) => ({outputs})
        <float s = {{0.1}}, int8 z = {{0}}> {{ {body} }}"""
    )
    random = np.random.default_rng(0)
    shapes = {"w": (1, 4 * HIDDEN, 5), "r": (1, 4 * HIDDEN, HIDDEN), "m": (5, 3), "k": (4, 5)}
    for name, shape in shapes.items():
        if any(name in node.input for node in model.graph.node):
            values = random.standard_normal(shape).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return graph_from_model(model)


@pytest.mark.parametrize(
    ("body", "integers", "float_"),
    [
        (f"{PAIR} y = LSTM<hidden_size = 6>(a, w, r)", [1, 2], [1, 2]),
        ("y = LSTM<hidden_size = 6>(x, w, r)", [], [1, 2]),
        (f"{PAIR} y = MatMul(a, m)", [1], [1]),
        (f"{PAIR} b = Transpose<perm = [0, 2, 1]>(a) y = MatMul(k, a)", [0], [0]),
        ("y = MatMul(x, m)", [], []),
        ("y = Relu(x)", [], []),
    ],
)
def test_which_are_weights(body: str, integers: list[int], float_: list[int]) -> None:
    node = graph(body).nodes[-1]
    assert weight_indices(node, recurrent=False) == integers
    assert weight_indices(node, recurrent=True) == float_


def test_what_they_are_multiplied_with() -> None:
    lstm = graph(f"{PAIR} y = LSTM<hidden_size = 6>(a, w, r)").nodes[-1]
    product = graph("y = MatMul(x, m)").nodes[-1]
    assert [activation_index(lstm, i) for i in (1, 2)] == [0, 0]
    assert [activation_index(product, i) for i in (0, 1)] == [1, 0]


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_lstms_weights_have_a_scale_per_row(bits: int, *, recurrent: bool) -> None:
    """Where they are stored alone, its input stays as it is."""
    body = "y = LSTM<hidden_size = 6>(x, w, r)"
    model = graph(body if recurrent else f"{PAIR} {body.replace('x', 'a')}")
    before = Session(model_from_graph(model), threads=1)
    spec = parse(f"quantize_weights(bits={bits}, recurrent={recurrent})")[0]
    first, second = run(model, [spec, spec], Context({"quantized"}), [well_formed])
    assert (first.changes, second.changes) == (2, 0)
    (node,) = [n for n in model.nodes if n.op == "LSTM"]
    makers = [node.inputs[i].inputs[0] for i in (1, 2)]
    assert [m.inputs[0].values.dtype.name for m in makers] == ["int8"] * 2
    assert [m.inputs[1].values.shape for m in makers] == [(4 * HIDDEN,)] * 2
    assert [m.attrs["axis"] for m in makers] == [1, 1]
    assert max(np.abs(m.inputs[0].values).max() for m in makers) <= (1 << (bits - 1)) - 1
    assert ("onnx_intq.bits" in metadata(model)) == (bits < 8)
    assert quantized_nodes(model, {node.name})["LSTM"] == 1
    x = np.random.default_rng(1).standard_normal((9, 2, 5)).astype(np.float32)
    want, have = (s.run({"x": x})["y"] for s in (before, Session(model_from_graph(model))))
    error = np.sqrt(np.square(have - want).mean() / np.square(want).mean())
    assert error < (0.15 if bits == 4 else 0.01)


def test_others_are_left_alone() -> None:
    model = graph("y = LSTM<hidden_size = 6>(x, w, r)")
    (report,) = run(model, parse("quantize_weights"), Context({"quantized"}))
    assert report.changes == 0
