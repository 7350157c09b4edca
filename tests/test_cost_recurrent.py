"""Recurrent layers are counted, float and in the bodies of Scan."""

from typing import Any

import numpy as np
import onnx
import pytest

from onnx_intq.cost import cost
from onnx_intq.graph import graph_from_model

SHAPES = {"x": (50, 2, 5)}


def recurrent(op: str, rows: int, *, dequantized: bool = False) -> Any:
    weights = {"w": np.ones((1, rows, 5)), "r": np.ones((1, rows, 3))}
    read = "a, b, d" if dequantized else "x, w, r"
    pairs = """a8 = QuantizeLinear(x, s, z) a = DequantizeLinear(a8, s, z)
        b = DequantizeLinear(w, s) d = DequantizeLinear(r, s)"""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[t, b, 5] x) => (float[t, 1, b, 3] y)
        <float s = {{0.1}}, uint8 z = {{0}}> {{
            {pairs if dequantized else ""} y = {op}<hidden_size = 3>({read}) }}"""
    )
    for name, values in weights.items():
        stored = values.astype(np.int8 if dequantized else np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(stored, name))
    return graph_from_model(model)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_both_products_at_every_step(op: str, gates: int) -> None:
    found = cost(recurrent(op, 3 * gates), shapes=SHAPES)
    first, second = found.nodes
    assert (first.op, first.bits, second.bits) == (op, (32, 32), (32, 32))
    assert (first.macs, second.macs) == (100 * 3 * gates * 5, 100 * 3 * gates * 3)
    assert first.elements == (100 * 5, 3 * gates * 5, 100 * 3 * gates)
    assert found.uncounted == ()
    assert found.by_op[op].nodes == 1


def test_the_hidden_state_is_float_between_its_steps() -> None:
    found = cost(recurrent("LSTM", 12, dequantized=True), shapes=SHAPES)
    assert [node.bits for node in found.nodes] == [(8, 8), (32, 8)]


def test_an_unknown_shape_is_named() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "own" : 1]> g (float[t, b, 5] x) => (float y) {
            u = own.What(x) y = LSTM<hidden_size = 3>(u, w, r) }"""
    )
    for name, columns in (("w", 5), ("r", 3)):
        values = np.ones((1, 12, columns), np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    assert cost(graph_from_model(model), shapes=SHAPES).uncounted == ("LSTM_1",)


def scan(first: str = "", axis: int = 0) -> Any:
    """A Scan over x whose body multiplies its state by 3 x 4, and what was scanned by k, 2 x 4."""
    shape = ("t, b, 2", "b, t, 2")[axis]
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (int8[{shape}] x, int8[b, 4] s, int8[2, 4] k) => (int8[b, 4] last, int32[t, b, 4] ys) {{
            {first or "u = Identity(x)"}
            last, ys = Scan<num_scan_inputs = 1, scan_input_axes = [{axis}], body =
                b (int8[b, 4] h, int8[b, 2] now) => (int8[b, 4] out, int32[b, 4] y) {{
                    y = MatMulInteger(h, m)
                    z = MatMulInteger(now, k)
                    v = Slice(y, zero, four, one)
                    t = Add(v, z)
                    out = Cast<to = 3>(t)
                }}>(s, u)
        }}"""
    )
    constants = {"zero": [0], "four": [4], "one": [1]}
    for name, values in constants.items():
        stored = onnx.numpy_helper.from_array(np.array(values, np.int64), name)
        model.graph.initializer.append(stored)
    weight = np.ones((4, 4), np.int8)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "m"))
    return graph_from_model(model)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_body_of_a_scan_counts_at_every_step(axis: int) -> None:
    shape = (50, 3, 2) if axis == 0 else (3, 50, 2)
    found = cost(scan(axis=axis), shapes={"x": shape, "s": (3, 4)})
    assert [(n.op, n.macs, n.bits) for n in found.nodes] == [
        ("MatMulInteger", 50 * 3 * 4 * 4, (8, 8)),
        ("MatMulInteger", 50 * 3 * 2 * 4, (8, 8)),
    ]
    assert found.nodes[0].elements == (50 * 12, 16, 50 * 12)


def test_a_scan_of_unknown_shape_is_named() -> None:
    found = cost(scan("u = own.What(x)"), shapes={"x": (50, 3, 2), "s": (3, 4)})
    assert (found.nodes, found.uncounted) == ((), ("Scan_1",))
