from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.check import check
from onnx_intq.graph import graph_from_model

CONV = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s, o)"
CLEAN = f"{CONV} y = Conv(d, v, b)"
ISLAND = """q = QuantizeLinear(x, s, z) i = Cast<to = 6>(q) p = Mul(i, i) j = Cast<to = 3>(p)
    y = DequantizeLinear(j, s, z)"""
FLOAT_WEIGHT = """f = QuantizeLinear(k, s, o) v = DequantizeLinear(f, s, o)
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Conv(d, v)"""
VALUES: dict[str, Any] = {
    "s": np.float32(0.1),
    "z": np.int8(0),
    "o": np.int8(0),
    "w": np.ones((4, 4, 1), np.int8),
    "b": np.zeros(4, np.float32),
}


def model(body: str, inputs: str = "float[1, 4, t] x", opset: int = 21, **values: Any) -> Any:
    """Of ONNX text that may name `VALUES` and, before these, `values`."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}, "own" : 1]>'
    proto = onnx.parser.parse_model(f"{text} g ({inputs}) => (float[1, 4, t] y) {{ {body} }}")
    read = {name for node in proto.graph.node for name in node.input}
    read -= {value.name for value in proto.graph.input}
    for name, value in {**VALUES, **values}.items():
        if name in read:
            array = onnx.numpy_helper.from_array(np.asarray(value), name)
            proto.graph.initializer.append(array)
    return proto


def graph(body: str, **values: Any) -> gs.Graph:
    return graph_from_model(model(body, **values))


BAD: list[tuple[str, str, dict[str, Any], list[str]]] = [
    ("zero-point", CLEAN, {"z": np.int8(3)}, ["QuantizeLinear_0"]),
    (
        "run-time-zero-point",
        CLEAN,
        {"inputs": "float[1, 4, t] x, int8 z"},
        ["QuantizeLinear_0"],
    ),
    ("unsigned", CLEAN, {"z": np.uint8(0)}, ["QuantizeLinear_0"]),
    (
        "unsigned",
        CLEAN,
        {"o": np.uint8(0), "w": np.ones((4, 4, 1), np.uint8)},
        ["DequantizeLinear_2"],
    ),
    (
        "missing-zero-point",
        CLEAN.replace(", z)", ")"),
        {},
        ["QuantizeLinear_0"],
    ),
    ("missing-zero-point", CLEAN.replace(", o)", ")"), {}, ["DequantizeLinear_2"]),
    (
        "int32-bias",
        f"{CONV} c = DequantizeLinear(b, s) y = Conv(d, v, c)",
        {"b": np.zeros(4, np.int32)},
        ["DequantizeLinear_3"],
    ),
    (
        "run-time-scale",
        CLEAN,
        {"inputs": "float[1, 4, t] x, float s"},
        ["QuantizeLinear_0", "DequantizeLinear_2"],
    ),
    (
        "integer-constant",
        f"{CONV} c = Conv(d, v, b) i = Cast<to = 1>(o) y = Mul(c, i)",
        {},
        ["Cast_4"],
    ),
    (
        "integer-constant",
        CLEAN.replace("DequantizeLinear(w,", "DequantizeLinear(t,").replace(
            "v =", "t = Transpose<perm = [1, 0, 2]>(w) v ="
        ),
        {},
        ["Transpose_2"],
    ),
    ("type", CLEAN, {"z": np.int16(0)}, ["QuantizeLinear_0", "DequantizeLinear_1"]),
    ("type", "c = Cast<to = 12>(x) y = Cast<to = 1>(c)", {}, ["Cast_0", "Cast_1"]),
    ("type", "c = Cast<to = 19>(x) y = Cast<to = 1>(c)", {}, ["Cast_0", "Cast_1"]),
    ("uint8", "c = Cast<to = 2>(x) e = Abs(c) y = Cast<to = 1>(e)", {}, ["Cast_0", "Abs_1"]),
    (
        "run-time-weight",
        f"{FLOAT_WEIGHT.replace('Conv', 'ConvTranspose')}",
        {"inputs": "float[1, 4, t] x, float[4, 4, 1] k"},
        ["ConvTranspose_4"],
    ),
    ("operator", "a = DFT(x) y = Identity(a)", {"inputs": "float[1, 4, 4, 1] x"}, ["DFT_0"]),
    ("operator", "y = own.Swoosh(x)", {}, ["Swoosh_0"]),
    ("integer-operator", "c = Cast<to = 6>(x) r = Relu(c) y = Cast<to = 1>(r)", {}, ["Relu_1"]),
]


@pytest.mark.parametrize(("rule", "body", "values", "nodes"), BAD)
def test_each_rule_names_the_nodes_that_break_it(
    rule: str, body: str, values: dict[str, Any], nodes: list[str]
) -> None:
    found = [p for p in check(graph(body, **values), "tensorrt") if p.rule == rule]
    assert [p.node for p in found] == nodes
    assert all(p.message.count(";") >= 2 and "expected" in p.message for p in found)


@pytest.mark.parametrize(
    "body",
    [CLEAN, "y = Relu(x)", ISLAND, FLOAT_WEIGHT],
    ids=["convolution", "float", "island", "float-weight"],
)
def test_what_tensorrt_takes_breaks_no_rule(body: str) -> None:
    assert check(graph(body, k=np.ones((4, 4, 1), np.float32)), "tensorrt") == []


def test_stored_integers_have_a_type_without_a_zero_point() -> None:
    found = check(graph(CLEAN.replace(", o)", ")")), "tensorrt")
    assert [p.message.partition(";")[0] for p in found] == ["no zero point"]


def test_the_graphs_own_inputs_and_outputs_may_be_uint8() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (uint8[2] x) => (uint8[2] y) { f = Cast<to = 1>(x) r = Relu(f) y = Cast<to = 2>(r) }"""
    )
    assert check(graph_from_model(proto), "tensorrt") == []


def test_weights_of_4_bits_may_have_blocks() -> None:
    proto = model("v = DequantizeLinear<axis = 0, block_size = 2>(w, s, z) y = MatMul(x, v)")
    for name, shape in (("w", [4, 4]), ("z", [2, 4])):
        proto.graph.initializer.remove(next(t for t in proto.graph.initializer if t.name == name))
        values = [1 if name == "w" else 0] * int(np.prod(shape))
        tensor = onnx.helper.make_tensor(name, onnx.TensorProto.INT4, shape, values)
        proto.graph.initializer.append(tensor)
    proto.graph.initializer.remove(next(t for t in proto.graph.initializer if t.name == "s"))
    scales = onnx.numpy_helper.from_array(np.ones((2, 4), np.float32), "s")
    proto.graph.initializer.append(scales)
    assert check(graph_from_model(proto), "tensorrt") == []


def test_int4_is_for_weights() -> None:
    four_bits = onnx.helper.make_tensor("z", onnx.TensorProto.INT4, [], [0])
    proto = model("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)")
    proto.graph.initializer.remove(next(t for t in proto.graph.initializer if t.name == "z"))
    proto.graph.initializer.append(four_bits)
    rules = {p.rule for p in check(graph_from_model(proto), "tensorrt")}
    assert "int4-activation" in rules

    weight = model("v = DequantizeLinear(w, s) y = Conv(x, v)")
    weight.graph.initializer.remove(next(t for t in weight.graph.initializer if t.name == "w"))
    w = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [4, 4, 1], [1] * 16)
    weight.graph.initializer.append(w)
    assert {p.rule for p in check(graph_from_model(weight), "tensorrt")} == {"missing-zero-point"}


def test_functions_of_the_model_are_known_operators() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        g (float[2] x) => (float[2] y) { y = own.Twice(x) }
        <opset_import: ["" : 21], domain: "own"> Twice (a) => (b) { b = Add(a, a) }"""
    )
    assert check(graph_from_model(proto), "tensorrt") == []


def test_rules_hold_in_the_bodies_of_nodes() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (bool c, float[2] x) => (float[2] y) <float s = {1}, uint8 z = {0}> {
            y = If(c) <
                then_branch = t () => (float[2] p) { q = QuantizeLinear(x, s, z)
                                                     p = DequantizeLinear(q, s, z) },
                else_branch = e () => (float[2] r) { r = Cos(x) }>
        }"""
    )
    assert [p.rule for p in check(graph_from_model(proto), "tensorrt")] == ["unsigned"]
