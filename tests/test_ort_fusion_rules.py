import platform
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.check import check
from onnx_intq.graph import graph_from_model
from onnx_intq.runtime import optimized_ops

IN = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s, o)"
OUT = "p = QuantizeLinear(c, s, z) y = DequantizeLinear(p, s, z)"
VALUES: dict[str, Any] = {
    "s": np.float32(0.1),
    "z": np.uint8(128),
    "o": np.int8(0),
    "w": np.ones((4, 4, 1), np.int8),
    "f": np.ones((4, 4, 1), np.float32),
    "b": np.ones(4, np.int32),
    "one": np.int32(1),
    "wide": np.uint16(0),
    "many": np.ones(4, np.float32),
    "zeros": np.zeros(4, np.int8),
    "bias_s": np.float32(0.1) * np.float32(0.1),
    "low": np.float32(0),
    "high": np.float32(6),
}
SIGNAL = "2, 4, t"
FLOAT = ("Conv", "FusedConv", "ConvTranspose", "MatMul", "Gemm", "FusedGemm", "FusedMatMul")
X86 = platform.machine().lower() in {"x86_64", "amd64"}


def model(body: str, shape: str = SIGNAL, **values: Any) -> onnx.ModelProto:
    rank = shape.count(",") + 1
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[{shape}] x) => (float[{", ".join("abc"[:rank])}] y) {{ {body} }}"""
    )
    read = {name for node in proto.graph.node for name in node.input}
    for name in sorted(read & VALUES.keys()):
        array = onnx.numpy_helper.from_array(np.asarray(values.get(name, VALUES[name])), name)
        proto.graph.initializer.append(array)
    return proto


def rules(proto: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(p.rule, p.node) for p in check(graph_from_model(proto), "ort")]


def runs_in_float(proto: onnx.ModelProto) -> bool:
    return any(optimized_ops(proto)[op] for op in FLOAT)


BIAS = f"{IN} e = DequantizeLinear(b, bias_s) c = Conv(d, v, e) {OUT}"
CLIP = f"{IN} k = Conv(d, v) c = Clip(k, low, high) {OUT}"
ON_GRID = {"s": np.float32(6 / 255), "z": np.uint8(0)}


@pytest.mark.parametrize(
    ("body", "values", "expected"),
    [
        (f"{IN} c = Conv(d, v) {OUT}", {}, []),
        (f"{IN} c = Conv(d, v) {OUT}", {"z": np.int8(0)}, []),
        (f"{IN} y = Conv(d, v)", {}, ["unfused"]),
        (f"{IN} c = Conv(d, v) {OUT} n = Neg(c)", {}, ["unfused"]),
        (f"{IN} c = ConvTranspose(d, v) {OUT}", {}, ["unfused"]),
        (f"{IN} c = Conv(d, v) {OUT}", {"z": np.uint16(128)}, ["unfused"]),
        (f"{IN} k = Conv(d, v) c = Relu(k) {OUT}", {}, ["unfused"]),
        (f"{IN} k = Conv(d, v) c = Relu(k) {OUT}", {"z": np.uint8(0)}, []),
        (f"{IN} k = Conv(d, v) c = Relu(k) {OUT}", {"z": np.int8(-128)}, []),
        (CLIP, {}, ["unfused"]),
        (CLIP, ON_GRID, []),
        (CLIP, {**ON_GRID, "high": np.float32(6.01)}, []),
        (CLIP, {**ON_GRID, "high": np.float32(5.9)}, ["unfused"]),
        (CLIP, {**ON_GRID, "low": np.float32(0.1)}, ["unfused"]),
        (CLIP.replace("k, low, high", "k"), {}, []),
        (BIAS, {}, []),
        (BIAS, {"bias_s": np.full(4, VALUES["bias_s"])}, []),
        (BIAS, {"bias_s": np.float32(0.02)}, ["bias"]),
        (BIAS, {"b": np.ones(4, np.int8)}, ["bias"]),
        (BIAS.replace("bias_s", "bias_s, one"), {}, ["bias"]),
        (f"{IN} c = Conv(x, v) {OUT}", {}, ["one-sided"]),
    ],
)
def test_what_breaks_a_rule_runs_in_float(
    body: str, values: dict[str, Any], expected: list[str]
) -> None:
    proto = model(body, **values)
    assert [rule for rule, _ in rules(proto)] == expected
    assert runs_in_float(proto) == bool(expected)


MATRIX = {"w": np.ones((4, 4), np.int8), "f": np.ones((4, 4), np.float32)}


@pytest.mark.parametrize(
    ("body", "shape", "expected"),
    [
        (f"{IN} c = MatMul(d, v) {OUT}", "2, t, 4", []),
        (f"{IN} y = MatMul(d, v)", "2, t, 4", []),
        (f"{IN} r = MatMul(d, v) y = Relu(r)", "2, t, 4", []),
        (f"{IN} k = MatMul(d, v) c = Relu(k) {OUT}", "2, t, 4", ["unfused"]),
        (f"{IN} k = MatMul(d, v) c = Tanh(k) {OUT}", "2, t, 4", []),
        (f"{IN} y = MatMul(x, v)", "2, t, 4", ["one-sided"]),
        (f"{IN} y = MatMul(d, f)", "2, t, 4", ["one-sided"]),
        (f"{IN} c = Gemm(d, v) {OUT}", "t, 4", []),
        (f"{IN} y = Gemm(d, v)", "t, 4", []),
        (f"{IN} e = DequantizeLinear(b, bias_s) y = Gemm(d, v, e)", "t, 4", []),
        (f"{IN} e = Cast<to = 1>(b) y = Gemm(d, v, e)", "t, 4", ["unfused"]),
        (f"{IN} y = Gemm(x, v)", "t, 4", ["one-sided"]),
    ],
)
def test_matrix_products_may_give_floats(body: str, shape: str, expected: list[str]) -> None:
    proto = model(body, shape, **MATRIX)
    assert [rule for rule, _ in rules(proto)] == expected
    assert runs_in_float(proto) == bool(expected)


def test_what_cannot_be_decided_is_passed_over() -> None:
    relu = f"{IN} k = Conv(d, v) c = Relu(k)"
    computed = f"{relu} e = Abs(s) p = QuantizeLinear(c, e, z) y = DequantizeLinear(p, e, z)"
    assert rules(model(computed)) == []
    wide = f"{relu} p = QuantizeLinear(c, s, wide) y = DequantizeLinear(p, s, wide)"
    assert rules(model(wide)) == []
    bias = BIAS.replace("e = Deq", "t = Abs(bias_s) e = Deq").replace("b, bias_s", "b, t")
    assert rules(model(bias)) == []


def test_scales_of_0_and_of_other_sizes_are_named_not_divided_by() -> None:
    clip = model(f"{IN} k = Conv(d, v) c = Relu(k) {OUT}", s=np.float32(0))
    assert {rule for rule, _ in rules(clip)} == {"scale"}
    bias = BIAS.replace("(w, s, o)", "<axis = 0>(w, many, zeros)")
    many = {"many": np.full(4, 0.1, np.float32), "zeros": np.zeros(4, np.int8)}
    assert rules(model(bias, SIGNAL, **many)) == []
    wrong = model(bias, SIGNAL, **many, bias_s=np.full(3, VALUES["bias_s"]))
    assert rules(wrong) == [("bias", "Conv_4")]


def test_stored_integers_of_unknown_type_are_passed_over() -> None:
    body = f"{IN} c = Conv(d, v) {OUT}"
    graph = graph_from_model(model(body))
    weight = graph.nodes[2]
    del weight.inputs[2]
    weight.inputs[0] = weight.inputs[0].to_variable()
    assert [p.rule for p in check(graph, "ort")] == []


@pytest.mark.skipif(not X86, reason="only there does onnxruntime avoid int8 activations")
@settings(derandomize=True, deadline=None, max_examples=25)
@given(data=st.data())
def test_the_rule_foretells_what_onnxruntime_fuses(data: st.DataObject) -> None:
    def draw(*choices: str) -> str:
        return data.draw(st.sampled_from(choices))

    op = draw("Conv", "MatMul", "Gemm")
    bias = draw("", ", e") if op != "MatMul" else ""
    activation = draw("", "c = Relu(k)", "c = Clip(k, low, high)", "c = Tanh(k)")
    out = draw(OUT, f"{OUT} m = Neg(y)", f"{OUT} m = Neg(c)", "y = Neg(c)", "y = Neg(c) m = Abs(c)")
    shared = draw("", "n = Neg(d)", "e2 = DequantizeLinear(q, s, z) n = Neg(e2)")
    zero = data.draw(st.sampled_from([np.int8(0), np.int8(-128), np.uint8(0), np.uint8(128)]))
    result = "k" if activation else "c"
    body = f"""{IN} e = DequantizeLinear(b, bias_s) {result} = {op}(d, v{bias}) {activation}
        {out} {shared}"""
    shapes = {"Conv": SIGNAL, "MatMul": "2, t, 4", "Gemm": "t, 4"}
    proto = model(body, shapes[op], z=zero, **({} if op == "Conv" else MATRIX))
    for name in ("m", "n"):
        if f" {name} = " in f" {body}":
            proto.graph.output.add().CopyFrom(proto.graph.output[0])
            proto.graph.output[-1].name = name
    assert {rule for rule, _ in rules(proto)} <= {"unfused"}
    assert bool(rules(proto)) == runs_in_float(proto), body
