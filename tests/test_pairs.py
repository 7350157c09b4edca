import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, graph_from_model, model_from_graph
from onnx_intq.pairs import append_pair, let_read
from onnx_intq.runtime import Session


def graph() -> gs.Graph:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n] x) => (float[n] y, float[n] z) { y = Add(x, x) z = Neg(x) }"""
    return graph_from_model(onnx.parser.parse_model(text))


def test_a_pair_rounds_for_those_who_read_it() -> None:
    model = graph()
    x, total = model.inputs[0], model.nodes[0]
    quantize, dequantize = append_pair(model, x, 0.5, 3, np.uint8, Names(model))
    assert (quantize.op, quantize.inputs[0]) == ("QuantizeLinear", x)
    assert all(a is b for a, b in zip(quantize.inputs[1:], dequantize.inputs[1:], strict=True))
    let_read([total], x, dequantize.outputs[0])
    assert all(t is dequantize.outputs[0] for t in total.inputs)
    values = np.array([0.3, -9, 0.2, 200], np.float32)
    found = Session(model_from_graph(model), threads=1).run({"x": values})
    assert found["y"].tolist() == [1.0, -3.0, 0.0, 252.0]  # the grid is -1.5 .. 126
    np.testing.assert_array_equal(found["z"], -values)


def test_names_are_new() -> None:
    model = graph()
    names = Names(model)
    pairs = [append_pair(model, model.inputs[0], 0.5, 0, np.int8, names) for _ in range(2)]
    made = [t.name for pair in pairs for node in pair for t in node.outputs]
    assert made == ["x_q", "x_dq", "x_q_", "x_dq_"]
    assert len({node.name for node in model.nodes}) == len(model.nodes)
