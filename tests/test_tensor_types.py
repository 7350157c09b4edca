"""Types follow from inputs, constants and nodes; whatever else a file says is thrown away."""

import onnx
import pytest
from onnx import GraphProto, ModelProto, TensorProto

from onnx_intq.integer_only import prove
from onnx_intq.tensor_types import typed_graph

BODIES = """
    g (int8[1, 4] x, int64 n, bool c) => (int64[1, 4] y)
        <int64 two = {2}> {
            wide = Cast<to = 7>(x)
            chosen = If(c) <
                then_branch = a () => (int64[1, 4] p) <int64 three = {3}> { p = Mul(wide, three) },
                else_branch = b () => (int64[1, 4] p) { p = Identity(wide) }>
            y = Loop(n, c, chosen) <
                body = d (int64 i, bool go, int64[1, 4] u) => (bool on, int64[1, 4] v) {
                    on = Identity(go)
                    v = Add(u, i)
                }>
        }"""


def model(text: str, opset: int = 17) -> ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>{text}')


def types(proto: ModelProto) -> dict[str, str | None]:
    return {tensor.name: tensor.type for tensor in typed_graph(proto).tensors}


def claim(graph: GraphProto, type_: int) -> None:
    """Say of all tensors that nodes make, in bodies too, that they have the type."""
    names = [name for node in graph.node for name in node.output]
    graph.value_info.extend(onnx.helper.make_tensor_value_info(n, type_, None) for n in names)
    for value in graph.output:
        value.type.tensor_type.elem_type = type_
    for node in graph.node:
        for attribute in node.attribute:
            for value in attribute.g.input:
                value.type.tensor_type.elem_type = type_
            claim(attribute.g, type_)


def test_every_tensor_has_its_type_and_source() -> None:
    found = typed_graph(model(BODIES))
    assert found.problem == ""
    assert [(t.name, t.type, t.source) for t in found.tensors] == [
        ("two", "tensor(int64)", "constant"),
        ("x", "tensor(int8)", "input"),
        ("n", "tensor(int64)", "input"),
        ("c", "tensor(bool)", "input"),
        ("wide", "tensor(int64)", "node"),
        ("chosen", "tensor(int64)", "node"),
        ("three", "tensor(int64)", "constant"),
        ("p", "tensor(int64)", "node"),
        ("p", "tensor(int64)", "node"),
        ("y", "tensor(int64)", "node"),
        ("i", "tensor(int64)", "body input"),
        ("go", "tensor(bool)", "body input"),
        ("u", "tensor(int64)", "body input"),
        ("on", "tensor(bool)", "node"),
        ("v", "tensor(int64)", "node"),
    ]
    assert [t.name for t in found.outputs] == ["y"]


def test_nodes_know_the_tensors_of_the_graphs_around_them() -> None:
    found = typed_graph(model(BODIES))
    assert [(n.name, n.inner) for n in found.nodes] == [
        ("Cast_0", False),
        ("If_1", False),
        ("If_1_Mul_0", True),
        ("If_1_Identity_0", True),
        ("Loop_2", False),
        ("Loop_2_Identity_0", True),
        ("Loop_2_Add_1", True),
    ]
    (wide,) = found.nodes[0].outputs
    assert [n.name for n in found.readers()[wide]] == ["If_1_Mul_0", "If_1_Identity_0"]


@pytest.mark.parametrize("type_", [TensorProto.FLOAT, TensorProto.INT8, TensorProto.STRING])
def test_what_the_file_says_about_types_is_thrown_away(type_: int) -> None:
    proto = model(BODIES)
    expected = types(proto)
    claim(proto.graph, type_)
    assert types(proto) == expected


def test_a_lie_about_a_float_body_does_not_help() -> None:
    proto = model(BODIES)
    branch = proto.graph.node[1].attribute[0].g
    branch.node[0].CopyFrom(onnx.helper.make_node("Cast", ["wide"], ["m"], to=1, name="to"))
    branch.node.append(onnx.helper.make_node("Cast", ["m"], ["p"], to=7, name="back"))
    claim(proto.graph, TensorProto.INT64)
    assert [(f.node, f.tensor) for f in prove(proto)] == [("to", "m"), ("back", "m")]


def test_large_weights_are_constants_too() -> None:
    proto = model("g (int8[1, 2000] x) => (int32[1, 1] y) { y = MatMulInteger(x, w) }")
    weight = onnx.helper.make_tensor("w", TensorProto.INT8, [2000, 1], [1] * 2000)
    proto.graph.initializer.append(weight)
    sources = {tensor.name: tensor.source for tensor in typed_graph(proto).tensors}
    assert sources == {"w": "constant", "x": "input", "y": "node"}
    assert types(proto)["y"] == "tensor(int32)"


def test_outputs_left_out_are_no_tensors() -> None:
    proto = model("g (int8[4] x, int64[1] k) => (int64[1] y) { _none, y = TopK(x, k) }")
    proto.graph.node[0].output[0] = ""
    assert types(proto).keys() == {"x", "k", "y"}


def test_a_model_that_inference_refuses_has_a_problem() -> None:
    found = typed_graph(model("g (int8[2] x, int8[3] b) => (int8[3] y) { y = Add(x, b) }"))
    assert "Incompatible dimensions" in found.problem
    assert found.nodes[0].outputs[0].type == "tensor(int8)"


def test_the_schema_answers_where_inference_fails_altogether(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: bool) -> ModelProto:
        raise ValueError("no types today")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", refuse)
    found = typed_graph(model(BODIES))
    assert found.problem == "no types today"
    inner = {t.name: t.type for n in found.nodes for t in n.outputs if n.op in {"Cast", "Mul"}}
    assert inner == {"wide": None, "p": "tensor(int64)"}


def test_the_schema_catches_an_inference_that_errs(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: ModelProto, **_: bool) -> ModelProto:
        copy = ModelProto()
        copy.CopyFrom(model)
        value = onnx.helper.make_tensor_value_info("a", TensorProto.INT32, None)
        copy.graph.value_info.append(value)
        return copy

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", wrong)
    found = typed_graph(model("g (int8 x) => (int8 y) { a = Neg(x) y = Neg(a) }"))
    why = "makes tensor(int8) by its schema, tensor(int32) by inference"
    assert [node.problem for node in found.nodes] == [why, ""]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("y = Floor(x)", "takes no tensor(int8) as X"),
        ("y = Add(x, n)", "takes tensor(int8) and tensor(int64) together"),
        ("y = ReduceMax(n, n)", "has 2 inputs; expected at most 1 in opset 17"),
        ("y = Blub(x)", "no operator Blub in opset 17"),
        ("y = Neg(later) later = Neg(x)", "reads 'later', which nothing before it makes"),
    ],
)
def test_a_node_tells_what_is_wrong_with_its_types(line: str, why: str) -> None:
    found = typed_graph(model(f"g (int8 x, int64 n) => (int8 y) {{ {line} }}"))
    assert found.nodes[0].problem == why


def test_types_that_are_no_tensors_have_names() -> None:
    text = """g (seq(int8) s, optional(int8[2]) o, sparse_tensor(int8[2]) p) => (int64 y) {
        y = SequenceLength(s) }"""
    assert types(model(text)) == {
        "s": "seq(tensor(int8))",
        "o": "optional(tensor(int8))",
        "p": "sparse_tensor(int8)",
        "y": "tensor(int64)",
    }
