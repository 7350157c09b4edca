from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.check import check
from onnx_intq.graph import graph_from_model
from onnx_intq.qdq_rules import half_quantized
from onnx_intq.runtime import Session

VECTOR = np.linspace(0.01, 0.1, 4, dtype=np.float32)
ZEROS = np.zeros(4, np.int8)


def model(body: str, opset: int, rank: int, values: dict[str, Any]) -> onnx.ModelProto:
    inputs = ", ".join(["2", "4", "4"][:rank])
    outputs = ", ".join("abc"[:rank])
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g (float[{inputs}] x) => (float[{outputs}] y) {{ {body} }}"""
    )
    for name, value in values.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return proto


def weighted(op: str, axis: int, rank: int = 3, kernel: tuple[int, ...] = (4, 4, 1)) -> Any:
    """`op` on a quantized input and a weight with one scale per index of `axis`."""
    weight = np.arange(np.prod(kernel), dtype=np.int8).reshape(kernel) - 7
    values = {"s": np.float32(0.1), "z": np.uint8(128), "w": weight, "v": VECTOR, "o": ZEROS}
    text = f"""q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        e = DequantizeLinear<axis = {axis}>(w, v, o) c = {op}(d, e)
        p = QuantizeLinear(c, s, z) y = DequantizeLinear(p, s, z)"""
    return model(text, 17, rank, values)


def rules(graph: gs.Graph, target: str = "ort") -> list[tuple[str, str]]:
    return [(p.rule, p.node) for p in check(graph, target)]


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
@pytest.mark.parametrize("bad", [0, -1, np.nan, np.inf])
def test_scales_are_positive_and_finite(target: str, bad: float) -> None:
    values = {"s": np.float32(bad), "z": np.int8(0)}
    text = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Relu(d)"
    found = rules(graph_from_model(model(text, 17, 2, values)), target)
    assert found == [("scale", "QuantizeLinear_0")]


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_activations_have_one_scale(target: str) -> None:
    values = {"s": VECTOR, "z": ZEROS}
    text = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Relu(d)"
    found = rules(graph_from_model(model(text, 17, 2, values)), target)
    assert found == [("per-channel-activation", "QuantizeLinear_0")]


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_one_scale_per_channel_needs_opset_13(target: str) -> None:
    values = {"w": np.ones((4, 4, 1), np.int8), "s": VECTOR, "z": ZEROS}
    text = "v = DequantizeLinear(w, s, z) y = Relu(v)"
    graph = graph_from_model(model(text, 12, 3, values))
    assert rules(graph, target) == [("per-channel-opset", "DequantizeLinear_0")]


WEIGHTED = [
    ("Conv", 3, (4, 4, 1), 0),
    ("MatMul", 2, (4, 4), 1),
    ("MatMul", 3, (2, 4, 4), None),
    ("Gemm", 2, (4, 4), 1),
    ("Gemm<transB = 1>", 2, (4, 4), 0),
    ("ConvTranspose", 3, (4, 4, 1), 1),
]


@pytest.mark.parametrize(("op", "rank", "kernel", "axis"), WEIGHTED)
def test_weights_have_one_scale_per_output_channel(
    op: str, rank: int, kernel: tuple[int, ...], axis: int | None
) -> None:
    for other in (i for i, size in enumerate(kernel) if size == len(VECTOR)):
        for written in (other, other - len(kernel)):
            graph = graph_from_model(weighted(op, written, rank, kernel))
            for target in ("ort", "tensorrt"):
                named = ("weight-axis", "DequantizeLinear_2") in rules(graph, target)
                assert named == (other != axis)


@pytest.mark.parametrize(
    ("op", "rank", "kernel", "axis"),
    [w for w in WEIGHTED if w[0] != "ConvTranspose" and w[3] is not None],
)
def test_onnxruntime_computes_other_axes_wrongly(
    op: str, rank: int, kernel: tuple[int, ...], axis: int
) -> None:
    x = {"x": np.random.default_rng(0).standard_normal((2, 4, 4)[:rank]).astype(np.float32)}
    for other in (i for i, size in enumerate(kernel) if size == len(VECTOR)):
        proto = weighted(op, other, rank, kernel)
        fused = Session(proto).run(x)["y"]
        exact = Session(proto, optimize=False).run(x)["y"]
        step = 0.1  # of the output: fused and exact may round a tie differently
        assert (np.abs(fused - exact).max() > 1.5 * step) == (other != axis)


def test_a_left_weight_has_one_scale() -> None:
    values = {"s": np.float32(0.1), "z": np.uint8(128), "w": np.ones((2, 4), np.int8)}
    values |= {"v": VECTOR[:2], "o": ZEROS[:2]}
    text = """q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        t = Transpose<perm = [1, 0]>(d) e = DequantizeLinear<axis = 0>(w, v, o)
        y = MatMul(e, t)"""
    found = rules(graph_from_model(model(text, 17, 2, values)))
    assert ("weight-axis", "DequantizeLinear_3") in found


def test_float_weights_quantized_in_place_have_axes_too() -> None:
    values = {"s": np.float32(0.1), "z": np.uint8(128), "v": VECTOR, "o": ZEROS}
    values["w"] = np.ones((4, 4, 1), np.float32)
    text = """q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        f = QuantizeLinear<axis = 1>(w, v, o) e = DequantizeLinear<axis = 1>(f, v, o)
        c = Conv(d, e) p = QuantizeLinear(c, s, z) y = DequantizeLinear(p, s, z)"""
    assert rules(graph_from_model(model(text, 17, 3, values))) == [
        ("weight-axis", "DequantizeLinear_3")
    ]


def test_weights_of_4_bits_may_stand_alone() -> None:
    proto = model("v = DequantizeLinear(w, s) y = MatMul(x, v)", 21, 2, {"s": np.float32(0.1)})
    for bits, expected in ((onnx.TensorProto.INT4, 0), (onnx.TensorProto.INT8, 1)):
        w = onnx.helper.make_tensor("w", bits, [4, 4], [1] * 16)
        proto.graph.initializer.append(w)
        assert len(list(half_quantized(graph_from_model(proto)))) == expected
        proto.graph.initializer.remove(w)
