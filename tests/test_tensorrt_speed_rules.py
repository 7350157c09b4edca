from typing import Any

import numpy as np
import onnx
import pytest

from onnx_intq.check import check, warn
from onnx_intq.graph import graph_from_model

PAIR = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s, z)"
TO_E = "p = QuantizeLinear({}, s, z) e = DequantizeLinear(p, s, z)"


def rules(body: str, inputs: str, **values: Any) -> list[tuple[str, str]]:
    """The warnings for a body whose `s`, `z` and `w` are a scale, a zero point and a weight."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g ({inputs}) => (float[...] y) {{ {body} }}""".replace("float[...]", "float[a, b, c]")
    )
    given = {"s": np.float32(0.1), "z": np.int8(0), **values}
    read = {name for node in proto.graph.node for name in node.input}
    for name in sorted(read & given.keys()):
        tensor = onnx.numpy_helper.from_array(np.asarray(given[name]), name)
        proto.graph.initializer.append(tensor)
    return [(p.rule, p.node) for p in warn(graph_from_model(proto), "tensorrt")]


@pytest.mark.parametrize(
    ("outputs", "inputs", "kernel", "first", "pays"),
    [
        (16, 16, (1,), False, True),
        (29, 1024, (1,), False, True),  # 16 on both sides: anything goes
        (17, 19, (3, 1), False, True),
        (16, 8, (1,), False, True),
        (8, 16, (3, 3), False, True),
        (8, 8, (3, 3), False, False),
        (8, 8, (3, 3), True, True),
        (8, 3, (3,), True, True),
        (7, 3, (3,), True, False),
        (15, 17, (1,), False, False),
        (16, 8, (1, 3), False, False),
    ],
)
def test_convolutions_need_channels(
    outputs: int, inputs: int, kernel: tuple[int, ...], first: bool, pays: bool
) -> None:
    weight = np.ones((outputs, inputs, *kernel), np.int8)
    axes = ", ".join(f"n{i}" for i in range(len(kernel)))
    body = f"{PAIR} y = Conv(d, v)"
    body = body if first else f"r = Relu(x) {body.replace('(x,', '(r,')}"
    found = rules(body, f"float[1, {inputs}, {axes}] x", w=weight)
    assert found == ([] if pays else [("small-convolution", f"Conv_{4 - first}")])


@pytest.mark.parametrize(
    ("channels", "inputs", "kernel", "pays"),
    [
        (64, 1, (33,), True),
        (64, 1, (3, 3), True),
        (64, 16, (1,), True),
        (64, 1, (2,), False),
        (64, 1, (3, 1), False),
        (60, 1, (3,), False),
    ],
)
def test_grouped_convolutions_need_channels_and_taps(
    channels: int, inputs: int, kernel: tuple[int, ...], pays: bool
) -> None:
    groups = channels // inputs
    axes = ", ".join(f"n{i}" for i in range(len(kernel)))
    body = f"{PAIR} y = Conv<group = {groups}>(d, v)"
    weight = np.ones((channels, inputs, *kernel), np.int8)
    found = rules(body, f"float[1, {channels}, {axes}] x", w=weight)
    assert found == ([] if pays else [("small-grouped-convolution", "Conv_3")])


@pytest.mark.parametrize(
    ("op", "inputs", "weight", "pays"),
    [
        ("MatMul", "float[1, n, 16] x", (16, 16), True),
        ("MatMul", "float[1, n, 15] x", (15, 64), False),
        ("MatMul", "float[1, n, 64] x", (64,), False),
        ("Gemm", "float[n, 64] x", (64, 15), False),
        ("Gemm<transB = 1>", "float[n, 64] x", (16, 64), True),
    ],
)
def test_matrix_products_need_a_tile(
    op: str, inputs: str, weight: tuple[int, ...], pays: bool
) -> None:
    found = rules(f"{PAIR} y = {op}(d, v)", inputs, w=np.ones(weight, np.int8))
    assert found == ([] if pays else [("small-product", f"{op.partition('<')[0]}_3")])


def test_float_products_and_products_of_activations_may_be_small() -> None:
    assert rules("y = MatMul(x, w)", "float[1, n, 4] x", w=np.ones((4, 4), np.float32)) == []
    body = f"{PAIR.partition(' v =')[0]} y = MatMul(d, d)"
    assert rules(body, "float[1, 4, 4] x") == []


@pytest.mark.parametrize(
    ("body", "warned"),
    [
        (f"{PAIR} c = Conv(d, v) a = Add(c, x) {TO_E.format('a')} y = Conv(e, v)", True),
        (
            f"{PAIR} c = Conv(d, v) a = Add(x, c) r = Relu(a) {TO_E.format('r')} y = Conv(e, v)",
            True,
        ),
        # A quantized operand, a float result, a float convolution, a constant: all as it should be.
        (f"{PAIR} c = Conv(d, v) a = Add(c, d) {TO_E.format('a')} y = Conv(e, v)", False),
        (f"{PAIR} c = Conv(d, v) y = Add(c, x)", False),
        (f"{PAIR} c = Tanh(x) a = Add(c, x) {TO_E.format('a')} y = Conv(e, v)", False),
        (f"{PAIR} c = Conv(d, v) a = Add(c, s) {TO_E.format('a')} y = Conv(e, v)", False),
    ],
)
def test_residual_sums_that_are_quantized_have_a_quantized_operand(body: str, warned: bool) -> None:
    weight = np.ones((16, 16, 1), np.int8)
    found = rules(body, "float[1, 16, n] x", w=weight)
    assert found == ([("float-residual", "Add_4")] if warned else [])


def test_warnings_are_no_problems() -> None:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 3, n] x) => (float[1, 3, n] y)
            <float s = {{0.1}}, int8 z = {{0}}, int8[3, 3, 1] w = {{1, 1, 1, 1, 1, 1, 1, 1, 1}}> {{
                {PAIR} y = Conv(d, v)
            }}"""
    )
    graph = graph_from_model(proto)
    assert check(graph, "tensorrt") == []
    assert [p.rule for p in warn(graph, "tensorrt")] == ["small-convolution"]
    assert warn(graph, "ort") == []
