import json
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.cost import BITS_KEY, NodeCost, Total, cost, type_bits
from onnx_intq.graph import graph_from_model, load, metadata
from onnx_intq.transform import IntqError


def graph(text: str, **weights: np.ndarray) -> gs.Graph:
    """Of ONNX text whose body may name constants given as arrays."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> g {text}'
    )
    for name, values in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return graph_from_model(model)


def ones(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("text", "weights", "macs"),
    [
        (
            "(float[1, 4, t] x) => (float[1, 6, u] y) { y = Conv<strides: ints = [2]>(x, w) }",
            {"w": ones(6, 4, 1)},
            50 * 6 * 4,
        ),
        (
            "(float[1, 4, t] x) => (float[1, 4, u] y) { y = Conv<group: int = 4>(x, w) }",
            {"w": ones(4, 1, 3)},
            98 * 4 * 3,
        ),
        (
            "(float[1, 4, t] x) => (float[1, 6, u] y) { y = ConvTranspose<group: int = 2>(x, w) }",
            {"w": ones(4, 3, 5)},
            100 * 4 * 3 * 5,
        ),
        ("(float[t, 4] x) => (float[t, 6] y) { y = MatMul(x, w) }", {"w": ones(4, 6)}, 4 * 6),
        (
            "(float[1, t, 4] x, float[1, 4, t] z) => (float[1, t, t] y) { y = MatMul(x, z) }",
            {},
            100 * 100 * 4,
        ),
        (
            "(float[1, 4, t] x) => (float[1, 4] y) { y = MatMul(x, w) }",
            {"w": ones(100)},
            4 * 100,
        ),
        (
            "(float[4, t] x) => (float[t, 6] y) { y = Gemm<transA: int = 1>(x, w) }",
            {"w": ones(4, 6)},
            100 * 4 * 6,
        ),
        (
            "(float[3, t] x) => (float[3, 6] y) { y = Gemm<transB: int = 1>(x, w) }",
            {"w": ones(6, 100)},
            3 * 100 * 6,
        ),
    ],
    ids=["conv", "depthwise", "transposed", "matmul", "attention", "vector", "gemm_a", "gemm_b"],
)
def test_float_operators(text: str, weights: dict[str, np.ndarray], macs: int) -> None:
    found = cost(graph(text, **weights), seconds=1)
    assert found.macs == macs
    assert found.bops == macs * 32 * 32
    assert not found.uncounted


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (
            "(uint8[1, 4, t] x) => (int32[1, 6, t] y) { y = ConvInteger(x, w, z) }",
            {"w": ones(6, 4, 1, dtype="int8"), "z": np.uint8(3)},
        ),
        (
            "(uint8[1, 4, t] x) => (uint8[1, 6, t] y) { y = QLinearConv(x, s, z, w, s, v, s, z) }",
            {
                "w": ones(6, 4, 1, dtype="int8"),
                "s": np.float32(1),
                "z": np.uint8(3),
                "v": np.int8(0),
            },
        ),
        (
            "(int8[1, 4, t] x) => (int32[1, 6, t] y) { y = MatMulInteger(w, x) }",
            {"w": ones(6, 4, dtype="uint8")},
        ),
        (
            "(int8[1, t, 4] x) => (int8[1, t, 6] y) { y = QLinearMatMul(x, s, z, w, s, z, s, z) }",
            {"w": ones(4, 6, dtype="int8"), "s": np.float32(1), "z": np.int8(0)},
        ),
    ],
    ids=["ConvInteger", "QLinearConv", "MatMulInteger", "QLinearMatMul"],
)
def test_integer_operators(text: str, weights: dict[str, np.ndarray]) -> None:
    found = cost(graph(text, **weights), seconds=1)
    assert found.macs == 100 * 4 * 6
    assert found.bops == found.macs * 8 * 8
    assert found.parameters == 24


QDQ = """(float[1, 4, t] x) => (float[1, 6, t] y)
    <float s = {0.1}, uint8 z = {128}, int8 v = {0}, float[6] bias = {1, 2, 3, 4, 5, 6}> {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        f = DequantizeLinear(w, s, v)
        y = Conv(d, f, bias)
    }"""


def test_quantized_graphs_count_the_bits_of_their_integers() -> None:
    model = graph(QDQ, w=ones(6, 4, 1, dtype="int8"))
    found = cost(model, seconds=1)
    assert [node.bits for node in found.nodes] == [(8, 8)]
    # 24 weights and 6 biases; scales and zero points are stored, but no parameters.
    assert found.parameters == 30
    assert found.weight_bytes == 24 + 6 * 4 + 4 + 1 + 1


def test_weights_on_a_narrower_grid_count_the_bits_recorded() -> None:
    model = graph(QDQ, w=ones(6, 4, 1, dtype="int8"))
    metadata(model)[BITS_KEY] = json.dumps({"w": 6})
    found = cost(model, seconds=1)
    assert found.bops == found.macs * 6 * 8
    assert found.weight_bytes == cost(graph(QDQ, w=ones(6, 4, 1, dtype="int8"))).weight_bytes


INTEGERS = "(uint8[1, 4, t] x) => (int32[1, 6, t] y) { y = ConvInteger(x, w, z, v) }"


@pytest.mark.parametrize(("recorded", "bits"), [({}, 8), ({"gone": 6}, 6), ({"gone": 4}, 8)])
@pytest.mark.parametrize("zero_point", [0, 128])
def test_renamed_weights_have_the_narrowest_recorded_width_that_holds_them(
    recorded: dict[str, int], bits: int, zero_point: int
) -> None:
    dtype = np.uint8 if zero_point else np.int8
    # On the 6-bit grid, but not on the 4-bit one.
    w = (np.linspace(-31, 31, 24).round() + zero_point).astype(dtype).reshape(6, 4, 1)
    model = graph(INTEGERS, w=w, z=np.asarray(3, np.uint8), v=np.asarray(zero_point, dtype))
    metadata(model)[BITS_KEY] = json.dumps(recorded)
    assert cost(model).nodes[0].bits == (8, bits)


def test_a_batch_multiplies_all_but_the_weights() -> None:
    text = """(float[n, 4, t] x, int64[m] length) => (float[n, 6, t] y) {
        y = Conv(x, w)
    }"""
    model = graph(text, w=ones(6, 4, 1))
    one, eight = cost(model), cost(model, batch=8)
    assert eight.inputs == {"x": (8, 4, 1000), "length": (8,)}
    assert (eight.macs, eight.bops) == (8 * one.macs, 8 * one.bops)
    assert eight.nodes[0].elements == (32000, 24, 48000)
    assert (eight.parameters, eight.weight_bytes) == (one.parameters, one.weight_bytes)


def test_a_nameless_axis_is_the_batch_only_if_it_is_the_first() -> None:
    model = graph("(float[n, 4, t] x) => (float[n, 6, t] y) { y = Conv(x, w) }", w=ones(6, 4, 1))
    model.inputs[0].shape = [None, 4, None]
    assert cost(model, batch=3, shapes={"x": (1, 4, 20)}).inputs == {"x": (3, 4, 20)}


@pytest.mark.parametrize(("axis", "batch"), [("1", 8), ("n", 0)])
def test_a_batch_that_does_not_fit_is_refused(axis: str, batch: int) -> None:
    model = graph(f"(float[{axis}, 4, t] x) => (float[{axis}, 4, t] y) {{ y = Conv(x, w) }}")
    message = rf"a batch of {batch} for inputs x \[.*4, 't'\]; expected 1 or more, .*; change"
    with pytest.raises(IntqError, match=message):
        cost(model, batch=batch)


def test_bits_are_followed_through_unpacking_and_moves() -> None:
    text = """(float[1, 4, t] x) => (float[1, 6, t] y)
        <float s = {0.1}, uint8 z = {128}, int64[3] size = {6, 4, 1}, float[3] table = {0, 1, 2}> {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            e = Reshape(d, e_size)
            i = Cast<to: int = 6>(packed)
            g = Gather(table, i)
            f = Reshape(g, size)
            y = Conv(e, f)
        }"""
    packed = np.zeros(24, np.uint8)
    model = graph(text, packed=packed, e_size=np.array([1, 4, -1], np.int64))
    assert cost(model).nodes[0].bits == (8, 32)
    metadata(model)[BITS_KEY] = json.dumps({"packed": 2})
    assert cost(model).nodes[0].bits == (8, 2)


def test_sub_byte_types_are_stored_packed() -> None:
    text = """(float[t, 4] x) => (float[t, 3] y)
        <int4[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4}, float s = {0.1}> {
            d = DequantizeLinear(w, s)
            y = MatMul(x, d)
        }"""
    found = cost(graph(text))
    assert found.weight_bytes == 6 + 4
    assert found.nodes[0].bits == (32, 4)


def test_totals_per_operator_and_in_all() -> None:
    text = """(float[1, t, 4] x) => (float[1, t, 2] y) {
        a = MatMul(x, w)
        b = MatMul(a, w)
        c = Transpose<perm: ints = [0, 2, 1]>(b)
        d = Conv(c, v)
        y = Transpose<perm: ints = [0, 2, 1]>(d)
    }"""
    found = cost(graph(text, w=ones(4, 4), v=ones(2, 4, 1)), shapes={"x": [1, 10, 4]})
    assert found.inputs == {"x": (1, 10, 4)}
    assert found.nodes[0] == NodeCost(
        name="MatMul_0", op="MatMul", macs=160, bits=(32, 32), elements=(40, 16, 40)
    )
    assert found.by_op == {
        "MatMul": Total(nodes=2, macs=320, bops=320 * 1024),
        "Conv": Total(nodes=1, macs=80, bops=80 * 1024),
    }
    assert (found.macs, found.bops) == (400, 400 * 1024)
    assert (found.parameters, found.weight_bytes) == (24, 96)


def test_what_cannot_be_counted_is_named() -> None:
    text = """(float[1, t, 4] x, bool q) => (float[1, t, 4] y) {
        a = com.microsoft.Odd(x)
        b = MatMul(a, w)
        c = Einsum<equation: string = "abc,cd->abd">(b, w)
        d = If(q) <
            then_branch = yes () => (float[1, t, 4] e) { e = MatMul(x, w) },
            else_branch = no () => (float[1, t, 4] f) { f = Identity(x) }
        >
        y = Add(c, d)
    }"""
    found = cost(graph(text, w=ones(4, 4)))
    assert found.uncounted == ("MatMul_1", "Einsum_2", "If_3")
    assert found.macs == 0
    # The body's constant is that of the graph around it: counted once.
    assert found.parameters == 16


def test_damaged_metadata_is_refused() -> None:
    for damaged in ("{", "[]", '{"w": "x"}', '{"w": null}'):
        model = graph(QDQ, w=ones(6, 4, 1, dtype="int8"))
        metadata(model)[BITS_KEY] = damaged
        with pytest.raises(IntqError, match=r"metadata onnx_intq.bits holds .*; expected JSON"):
            cost(model)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (np.dtype(np.float32), 32),
        (np.int8, 8),
        (np.dtype(np.bool_), 8),
        (onnx.TensorProto.BFLOAT16, 16),
        (onnx.TensorProto.INT4, 4),
        (onnx.TensorProto.FLOAT8E4M3FN, 8),
        (None, 32),
    ],
)
def test_type_bits(dtype: type | int | None, bits: int) -> None:
    assert type_bits(dtype) == bits


def test_a_real_model(assets: Path) -> None:
    model = load(assets / "matchboxnet_3x2x64_all35_bn.onnx")
    found = cost(model)
    weights = [n.inputs[1].values.size for n in model.nodes if n.op == "Conv"]
    # 128 frames: 59 after the first layer's 11 taps with stride 2, 3 after 29 taps with dilation 2.
    frames = [59] * (len(weights) - 3) + [3] * 3
    assert [node.macs for node in found.nodes] == [
        size * count for size, count in zip(weights, frames, strict=True)
    ]
    assert not found.uncounted
