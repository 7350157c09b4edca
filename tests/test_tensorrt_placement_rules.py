from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.check import check
from onnx_intq.graph import graph_from_model

IN = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s, z)"
CONV = f"{IN} c = Conv(d, v)"
TO_E = "p = QuantizeLinear({}, s, z) e = DequantizeLinear(p, s, z)"
AGAIN = TO_E.format("c")
STATISTICS = "one, one, one, one"
VALUES: dict[str, Any] = {
    "s": np.float32(0.1),
    "s2": np.float32(0.2),
    "z": np.int8(0),
    "w": np.ones((4, 4, 1), np.int8),
    "float_w": np.ones((4, 4, 1), np.float32),
    "one": np.ones(4, np.float32),
    "k": np.float32(2),
}


def graph(body: str, **values: Any) -> gs.Graph:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 4, t] x) => (float[n, m, t] y) {{ {body} }}"""
    )
    read = {name for node in proto.graph.node for name in node.input}
    for name in sorted(read & VALUES.keys()):
        array = onnx.numpy_helper.from_array(np.asarray(values.get(name, VALUES[name])), name)
        proto.graph.initializer.append(array)
    return graph_from_model(proto)


@pytest.mark.parametrize(
    ("rule", "body", "node"),
    [
        ("one-sided", f"{IN} y = Conv(d, float_w)", "Conv_3"),
        ("one-sided", f"{IN} y = Conv(x, v)", "Conv_3"),
        ("split-fusion", f"{CONV} {AGAIN} y = Relu(e)", "Relu_6"),
        ("split-fusion", f"{CONV} {AGAIN} y = Clip(e, k)", "Clip_6"),
        (
            "split-fusion",
            f"{CONV} {AGAIN} y = BatchNormalization(e, {STATISTICS})",
            "BatchNormalization_6",
        ),
        ("batch-norm", f"{CONV} y = BatchNormalization(c, {STATISTICS})", "BatchNormalization_4"),
        (
            "concat-scales",
            f"""{IN} p = QuantizeLinear(x, s2, z) e = DequantizeLinear(p, s2, z)
            y = Concat<axis = 1>(d, e)""",
            "Concat_5",
        ),
        (
            "both-sides",
            f"""{IN} c = MaxPool<kernel_shape = [2]>(d) {AGAIN} y = Conv(e, v)""",
            "MaxPool_3",
        ),
        ("residual", f"{CONV} {AGAIN} y = Add(e, d)", "Add_6"),
        ("front-end", f"{IN} y = Log(d)", "Log_3"),
        ("front-end", f"{IN} y = Div(x, d)", "Div_3"),
        ("output", f"{CONV} r = Relu(c) p = QuantizeLinear(r, s, z) y = DequantizeLinear(p, s, z)",
         "DequantizeLinear_6"),
    ],
)  # fmt: skip
def test_each_rule_names_the_node_that_breaks_it(rule: str, body: str, node: str) -> None:
    (found,) = check(graph(body), "tensorrt")
    assert (found.rule, found.node) == (rule, node)
    assert found.message.count(";") == 2
    assert "expected" in found.message


@pytest.mark.parametrize(
    "body",
    [
        f"{CONV} r = Relu(c) {TO_E.format('r')} y = Conv(e, v)",
        f"{CONV} y = Add(c, d)",
        f"{CONV} t = Tanh(c) {TO_E.format('t')} y = Add(d, e)",
        f"{IN} {TO_E.format('x')} y = Concat<axis = 1>(d, e)",
        f"{CONV} y = Concat<axis = 1>(c, c)",
        f"{IN} m = MaxPool<kernel_shape = [2]>(d) y = Conv(m, v)",
        f"{CONV} m = MaxPool<kernel_shape = [2]>(c) {TO_E.format('m')} y = Conv(e, v)",
        f"{IN} y = Div(d, k)",
        f"{IN} l = Log(x) y = Conv(d, v)",
        f"f = BatchNormalization(x, {STATISTICS}) y = Conv(f, float_w)",
        f"f = Conv(x, float_w) y = BatchNormalization(f, {STATISTICS})",
    ],
)
def test_what_fuses_breaks_no_rule(body: str) -> None:
    assert check(graph(body), "tensorrt") == []


def test_moved_inputs_count_as_quantized() -> None:
    body = f"{IN} t = Transpose<perm = [0, 1, 2]>(d) y = Conv(t, v)"
    assert check(graph(body), "tensorrt") == []
