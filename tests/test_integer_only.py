"""What keeps a model from being integer-only: its boundary, its nodes, its tensors, the file."""

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto

from onnx_intq import integer_only, tensor_types
from onnx_intq.integer_only import Finding, examine, prove

DENSE = """
    g (float[2, 4] x) => (float[2, 3] y)
        <float sx = {0.1}, uint8 zx = {128}, float sy = {0.2}, int8 zy = {-3}, int32 half = {8},
         int8[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, int32 power = {16}> {
            q = QuantizeLinear(x, sx, zx)
            acc = MatMulInteger(q, w, zx)
            rounded = Add(acc, half)
            shifted = Div(rounded, power)
            narrow = Cast<to = 3>(shifted)
            y = DequantizeLinear(narrow, sy, zy)
        }"""
NEG = "g (int8 x) => (int8 y) { a = Neg(x) y = Neg(a) }"


def model(text: str, opset: int = 17) -> ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>{text}')


def named(findings: Sequence[Finding]) -> set[str]:
    return {finding.node for finding in findings}


TINY = """g (float[2] x, int32[2] i) => (float[2] y)
    <float s = {0.1}, uint8 z = {128}, float t = {1}> {
        q = QuantizeLinear(x, s, z)
        %s
        y = DequantizeLinear(q, s, z)
    }"""
"""A boundary, with room for what must not be there; `t` is read where the line does."""


def found_with(line: str) -> list[tuple[str, str]]:
    """The nodes and tensors found with `line` between the boundary nodes."""
    text = TINY % line
    if not re.search(r"\bt\b", line):
        text = text.replace(", float t = {1}", "")
    return [(f.node, f.tensor) for f in prove(model(text))]


@pytest.mark.parametrize(
    ("line", "node", "tensor"),
    [
        ("a = Identity(x)", "Identity_1", "a"),
        ("a = Shape(x)", "Shape_1", "x"),
        ("a = QuantizeLinear(x, s, z)", "QuantizeLinear_1", "x"),
        ("a = QuantizeLinear(t, s, z)", "QuantizeLinear_1", "t"),
        ("a = DequantizeLinear(q, s, z)", "DequantizeLinear_1", "a"),
        ("a, b, c = DynamicQuantizeLinear(t)", "DynamicQuantizeLinear_1", "b"),
        ("a = Cast<to = 6>(s)", "Cast_1", "s"),
        ("a = Size(t)", "Size_1", "t"),
        ("a = QLinearMatMul(q, s, z, q, s, z, s, z)", "QLinearMatMul_1", "s"),
        ("a = Constant<value_float = 1.0>()", "Constant_1", "a"),
        ("a = Constant<value = double[1] {1}>()", "Constant_1", "a"),
        ('a = Constant<value_string = "a">()', "Constant_1", "a"),
        ("a = Add(q, i)", "Add_1", "a"),
        ("a = Relu(q)", "Relu_1", "a"),
        ("a = Identity(later) later = Identity(q)", "Identity_1", "a"),
        ("a = Optional<type = int64>()", "Optional_1", "a"),
    ],
)
def test_one_bad_node_is_named(line: str, node: str, tensor: str) -> None:
    assert [f for f in found_with(line) if f[0] != "model"] == [(node, tensor)]


def test_a_name_is_of_the_node_and_body_it_stands_in() -> None:
    line = """yes = Constant<value = bool {1}>() r = If(yes) <
        then_branch = a () => (int64 p) { n = Neg(x) p = Size(n) },
        else_branch = b () => (int64 o) { k = QuantizeLinear(x, s, z) o = Size(k) }>"""
    assert found_with(line) == [
        ("If_2_Neg_0", "n"),
        ("If_2_Size_1", "n"),
        ("If_2_QuantizeLinear_0", "x"),
    ]


@pytest.mark.parametrize(
    ("text", "tensor", "why"),
    [
        ("(float[2] x) => (float[2] x) { a = Neg(b) }", "x", "an output that is the input itself"),
        ("() => (float c) <float c = {1}> { a = Neg(b) }", "c", "the constant itself"),
        ("() => (int8 y) { a = Neg(b) }", "y", "an output that nothing makes"),
        ("() => (int8 y) <int8 a = {1}, float c = {1}> { y = Neg(a) }", "c", "nothing reads"),
        ("(int8 a, float16 h) => (int8 y) { y = Neg(a) }", "h", "the input is tensor(float16)"),
        ("(int8 a, string h) => (int8 y) { y = Neg(a) }", "h", "the input is tensor(string)"),
        ("(int8 a, seq(int8) h) => (int8 y) { y = Neg(a) }", "h", "is seq(tensor(int8))"),
        ("(int8 a, map(int64, int8) h) => (int8 y) { y = Neg(a) }", "h", "is map_type"),
        ("(int8 a) => (int32 y) { y = Neg(a) }", "y", "tensor(int8); the file says tensor(int32)"),
    ],
)
def test_a_bad_tensor_is_named(text: str, tensor: str, why: str) -> None:
    assert any(f.tensor == tensor and why in f.why for f in prove(model(f"g {text}")))


def test_a_float_input_that_nothing_reads_is_told_but_no_finding() -> None:
    proof = examine(model("g (int8 a, float b) => (int8 y) { y = Neg(a) }"))
    assert (proof.findings, proof.unread) == ((), ("b",))


def test_an_input_without_a_type_proves_nothing() -> None:
    proto = model("g (int8 a, int8 b) => (int8 y) { y = Neg(a) }")
    proto.graph.input[1].ClearField("type")
    assert [(f.tensor, f.why) for f in prove(proto)] == [
        ("b", "the input has no type; expected an integer type")
    ]


def test_a_sparse_constant_is_no_integer_tensor() -> None:
    proto = model("g (int8[3] a) => (int8[3] y) { y = Neg(a) }")
    values = onnx.helper.make_tensor("w", TensorProto.INT8, [1], [3])
    places = onnx.helper.make_tensor("w_places", TensorProto.INT64, [1], [0])
    sparse = onnx.helper.make_sparse_tensor(values, places, [3])
    proto.graph.sparse_initializer.append(sparse)
    assert [(f.node, f.tensor) for f in prove(proto)] == [("model", "w")]
    proto.graph.node[0].input[0] = "w"
    assert "Neg_0" in named(prove(proto))


def test_an_unread_float_input_of_a_body_is_found() -> None:
    text = """g (float[1] x, int64 n, bool c) => (int64 y) <float s = {1}> {
        r = Loop(n, c, x) <body = b (int64 i, bool go, float[1] u) => (bool on, float[1] u) {
            on = Identity(go) }>
        y = Neg(n) }"""
    found = {(f.node, f.tensor) for f in prove(model(text))}
    assert found >= {("Loop_0", "x"), ("model", "u")}


@pytest.mark.parametrize("kind", ["Constant", "computed", "replaceable", "double"])
def test_scales_of_the_boundary_are_float32_constants(kind: str) -> None:
    proto = model(DENSE)
    (at,) = [i for i, t in enumerate(proto.graph.initializer) if t.name == "sx"]
    scale = proto.graph.initializer[at]
    if kind == "replaceable":
        proto.graph.input.append(onnx.helper.make_tensor_value_info("sx", TensorProto.FLOAT, []))
    elif kind == "double":
        scale.CopyFrom(onnx.helper.make_tensor("sx", TensorProto.DOUBLE, [], [0.5]))
    else:
        made = onnx.helper.make_node("Constant", [], ["sx"], name="scale", value=scale)
        if kind == "computed":
            made = onnx.helper.make_node("Size", ["x"], ["sx"], name="scale")
        proto.graph.node.insert(0, made)
        del proto.graph.initializer[at]
    findings = [(f.node, f.tensor) for f in prove(proto) if f.node != "model"]
    expected = {
        "Constant": [],
        "computed": [("scale", "x")],
        "replaceable": [("QuantizeLinear_0", "sx")],
        "double": [("QuantizeLinear_0", "sx")],
    }
    assert findings[:1] == expected[kind]


def test_a_constant_is_found_if_the_scale_has_other_readers() -> None:
    proto = model(DENSE)
    proto.graph.node.append(onnx.helper.make_node("Ceil", ["sx"], ["more"], name="ceil"))
    assert [(f.node, f.tensor) for f in prove(proto)] == [("ceil", "more")]


@pytest.mark.parametrize("end", ["x", "y"])
@pytest.mark.parametrize("op", ["Identity", "Relu", "Floor"])
def test_nothing_stands_between_the_boundary_and_the_world(end: str, op: str) -> None:
    proto = model(DENSE)
    first, last = proto.graph.node[0], proto.graph.node[-1]
    if end == "x":
        first.input[0] = "inside"
        proto.graph.node.insert(0, onnx.helper.make_node(op, ["x"], ["inside"], name="new"))
        expected = {"new", "QuantizeLinear_1"}
    else:
        last.output[0] = "inside"
        proto.graph.node.append(onnx.helper.make_node(op, ["inside"], ["y"], name="new"))
        expected = {"new", "DequantizeLinear_5"}
    assert {f.node for f in prove(proto)} == expected


def test_the_output_of_the_boundary_has_no_reader() -> None:
    proto = model(DENSE)
    proto.graph.node.append(onnx.helper.make_node("Size", ["y"], ["size"], name="new"))
    assert [(f.node, f.tensor) for f in prove(proto)] == [("new", "y")]


def test_an_integer_input_is_not_quantized() -> None:
    text = """g (int32[2] x) => (uint8[2] y) <float s = {1}, uint8 z = {0}> {
        y = QuantizeLinear(x, s, z) }"""
    assert "QuantizeLinear_0" in named(prove(model(text)))


def test_an_output_declared_as_integers_is_float_all_the_same() -> None:
    proto = model("g (int8 x) => (int8 y) { y = Cast<to = 1>(x) }")
    assert [(f.node, f.tensor) for f in prove(proto)] == [("Cast_0", "y"), ("Cast_0", "y")]


@pytest.mark.parametrize(("opset", "passes"), [(16, False), (17, True), (21, True), (999, False)])
def test_the_opset_is_17_or_newer_and_known(opset: int, passes: bool) -> None:
    findings = prove(model(NEG, opset))
    assert passes == (not findings)
    assert passes or findings[0].why.startswith(f"opset {opset}; expected 17 to ")


def test_a_model_without_the_default_domain_proves_nothing() -> None:
    proto = model(NEG)
    proto.opset_import[0].domain = "com.acme"
    assert {f.node for f in prove(proto)} >= {
        n.op_type + f"_{i}" for i, n in enumerate(proto.graph.node)
    }


def test_functions_of_the_models_own_are_found() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17, "own" : 1]>
        g (int8 x) => (int8 y) { y = own.twice(x) }
        <domain: "own", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }"""
    )
    assert [f.node for f in prove(proto)] == ["twice", "twice_0"]


def test_opset_21_has_wider_grids() -> None:
    text = DENSE.replace("int8 zy", "int16 zy").replace("to = 3", "to = 5")
    assert prove(model(text, 21)) == []


def test_float8_is_no_integer_type() -> None:
    text = """g (float x) => (float y) <float s = {1}> {
        q = QuantizeLinear<output_dtype = 17>(x, s) y = DequantizeLinear(q, s) }"""
    assert [(f.node, f.tensor) for f in prove(model(text, 21))] == [
        ("QuantizeLinear_0", "q"),
        ("DequantizeLinear_1", "q"),
    ]


def test_the_prover_knows_none_of_the_code_that_makes_such_models() -> None:
    for module in (integer_only, tensor_types):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        imported = {
            name
            for node in ast.walk(tree)
            for name in (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [each.name for each in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
        own = {name for name in imported if name and name.startswith("onnx_intq")}
        assert own <= {"onnx_intq.graph", "onnx_intq.tensor_types"}
