from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model
from onnx_intq.weight_sites import channel_axis, quantizable_weights

SHAPES = {
    "c": (8, 4, 3),
    "d": (4, 6, 3),
    "m": (8, 5),
    "g": (5, 8),
    "left": (3, 8),
    "deep": (2, 8, 5),
    "table": (64, 32),
    "short": (4, 8),
    "W": (1, 16, 8),
    "R": (1, 16, 4),
    "v": (8,),
}


def graph(body: str) -> gs.Graph:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 4, t] x, float[2, 8] a, float[t, 2, 8] s, int64[2] i, float[8, 5] z)
        => (float[] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    read = {name for node in model.graph.node for name in node.input}
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        if name in read:
            values = random.normal(size=shape).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return graph_from_model(model)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("y = Conv(x, c)", {"c": 0}),
        ("y = ConvTranspose(x, d)", {"d": 1}),
        ("y = ConvTranspose<group = 2>(x, d)", {"d": None}),
        ("y = MatMul(a, m)", {"m": 1}),
        ("y = MatMul(left, z)", {"left": None}),
        ("y = MatMul(a, deep)", {"deep": None}),
        ("y = Gemm<transB = 1>(a, g, )", {"g": 0}),
        ("y = Gemm(a, m)", {"m": 1}),
        ("y, h, k = LSTM<hidden_size = 4>(s, W, R)", {"W": 1, "R": 1}),
        ("y = Gather(table, i)", {"table": None}),
        ("y = Gather(short, i)", {}),
        ("y = MatMul(a, z)", {}),
        ("y = MatMul(left, m)", {}),
        ("y = MatMul(a, v)", {}),
        ("y = Add(a, m)", {}),
    ],
)
def test_weights_and_their_axes(body: str, wanted: dict[str, int | None]) -> None:
    found = quantizable_weights(graph(body))
    assert {site.name: site.axis for site in found} == wanted
    assert all(site.constant.values.dtype == np.float32 for site in found)


def test_a_shared_weight_is_one_site() -> None:
    both = graph("p = MatMul(a, m) q = MatMul(a, m) y = Add(p, q)")
    (site,) = quantizable_weights(both)
    assert (site.axis, len(site.nodes)) == (1, 2)
    across = graph("p = MatMul(a, m) q = Gemm<transB = 1>(p, m) y = Add(q, a)")
    (site,) = quantizable_weights(across)
    assert site.axis is None


def test_integers_are_no_weights() -> None:
    net = graph("y = MatMul(a, m)")
    net.tensors()["m"].values = np.zeros((8, 5), np.int32)
    assert quantizable_weights(net) == []
    assert channel_axis(net.nodes[0], 1) == 1
