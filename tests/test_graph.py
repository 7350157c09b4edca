import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import (
    Names,
    constant,
    convert_opset,
    element_type,
    graph_from_model,
    metadata,
    model_from_graph,
    producer,
    remove,
    replace_uses,
    require_float32,
    sole_consumer,
    subgraphs,
    weight_bytes,
    with_metadata,
)
from onnx_intq.runtime import Session
from onnx_intq.transform import IntqError

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
MODEL = f"""{HEADER} g (float[2, 3] x) => (float[2, 3] y) <float[3] w = {{1, 2, 3}}> {{
    a = Add(x, w)
    b = Relu(a)
    y = Mul(b, w)
}}"""
BRANCH = f"""{HEADER} g (float[3] x, bool q) => (float[3] y) <float[3] w = {{1, 2, 3}}> {{
    a = Abs(x)
    b = Neg(x)
    y = If(q) <
        then_branch = yes () => (float[3] t) {{ u = Add(a, w) t = Relu(u) }},
        else_branch = no () => (float[3] e) {{ u = Add(a, b) e = Abs(u) }}
    >
}}"""
FEEDS = {"x": np.array([[-2, 0.5, 1], [3, -4, 5]], np.float32)}


def graph(text: str = MODEL) -> gs.Graph:
    return graph_from_model(onnx.parser.parse_model(text))


def one_node(body: str, opset: int) -> gs.Graph:
    header = HEADER.replace("17", str(opset))
    return graph(f"{header} g (float[2, 3] x) => (float[2, 3] y) {{ {body} }}")


def node(model: gs.Graph, name: str) -> gs.Node:
    (found,) = (n for sub in subgraphs(model) for n in sub.nodes if n.name == name)
    return found


def tensor(model: gs.Graph, name: str) -> gs.Tensor:
    return model.tensors()[name]


def outputs(model: gs.Graph) -> dict[str, np.ndarray]:
    return Session(model_from_graph(model), threads=1, optimize=False).run(FEEDS)


# Order


def test_nodes_are_sorted_however_deep_the_graph() -> None:
    chain = "".join(f"t{i + 1} = Neg(t{i})\n" for i in range(3000))
    model = graph(f"{HEADER} g (float[3] t0) => (float[3] t3000) {{ {chain} }}")
    expected = [n.name for n in model.nodes]
    model.nodes.reverse()
    assert [n.name for n in model_from_graph(model).graph.node] == expected


def test_sorted_nodes_stay_where_they_are_and_bodies_reads_count() -> None:
    model = graph(BRANCH)
    model.nodes[:] = [model.nodes[i] for i in (2, 1, 0)]
    for sub in list(subgraphs(model))[1:]:
        sub.nodes.reverse()
    again = graph_from_model(model_from_graph(model))
    assert [n.op for n in again.nodes] in (["Abs", "Neg", "If"], ["Neg", "Abs", "If"])
    assert [n.op for sub in list(subgraphs(again))[1:] for n in sub.nodes] == [
        "Add",
        "Relu",
        "Add",
        "Abs",
    ]
    model = graph()
    before = [n.name for n in model.nodes]
    model_from_graph(model)
    assert [n.name for n in model.nodes] == before


# Edits


def test_a_weight_that_two_graphs_read_counts_once() -> None:
    text = BRANCH.replace("b = Neg(x)", "b = Add(x, w)").replace("Add(a, b)", "Add(a, w)")
    assert weight_bytes(graph(text)) == 12


def test_consumers_and_producers() -> None:
    text = f"""{HEADER} g (float[3] x) => (float[3] b, float[3] d) {{
        a = Abs(x)
        b = Neg(a)
        c = Mul(a, b)
        d = Relu(c)
        dead = Exp(x)
    }}"""
    model = graph(text)
    assert sole_consumer(model, tensor(model, "c")) is node(model, "Relu_3")
    for name in ("a", "b", "dead"):  # read twice; read, but an output, too; not read
        assert sole_consumer(model, tensor(model, name)) is None
    assert producer(tensor(model, "c")) is node(model, "Mul_2")
    assert producer(tensor(model, "x")) is None
    assert constant(node(model, "Abs_0"), 0) is None
    assert constant(node(model, "Abs_0"), 1) is None


def test_a_tensor_read_twice_by_one_node_has_no_sole_consumer() -> None:
    model = graph(f"{HEADER} g (float[3] x) => (float[3] y) {{ a = Abs(x) y = Mul(a, a) }}")
    assert sole_consumer(model, tensor(model, "a")) is None


def test_removed_nodes_are_detached() -> None:
    model = graph()
    gone = [node(model, "Add_0"), node(model, "Relu_1")]
    remove(model, gone)
    assert [n.op for n in model.nodes] == ["Mul"]
    assert not any(n.inputs or n.outputs for n in gone)
    assert not tensor(model, "b").inputs
    remove(model, [])
    assert len(model.nodes) == 1


def test_uses_are_replaced_in_nodes_and_bodies() -> None:
    model = graph(BRANCH)
    a, b = tensor(model, "a"), tensor(model, "b")
    replace_uses(model, a, b)
    assert not a.outputs
    assert [t.name for t in node(model, "body1_Add_0").inputs] == ["b", "w"]
    assert [t.name for t in node(model, "body2_Add_0").inputs] == ["b", "b"]
    assert len(b.outputs) == 3


def test_an_output_keeps_its_name() -> None:
    model = graph()
    y, b = tensor(model, "y"), tensor(model, "b")
    replace_uses(model, y, b)
    remove(model, [node(model, "Mul_2")])
    assert model.outputs == [b]
    assert (b.name, y.name) == ("y", "b")
    np.testing.assert_array_equal(outputs(model)["y"], np.maximum(FEEDS["x"] + [1, 2, 3], 0))


def test_an_output_of_a_body_keeps_its_name() -> None:
    model = graph(BRANCH)
    body = list(subgraphs(model))[1]
    (t,), (u,) = body.outputs, node(model, "body1_Add_0").outputs
    replace_uses(body, t, u)
    remove(body, [node(model, "body1_Relu_1")])
    feeds = {"x": np.array([-1, 2, -3], np.float32), "q": np.array(True)}
    found = Session(model_from_graph(model), threads=1).run(feeds)["y"]
    np.testing.assert_array_equal(found, [2, 4, 6])


def test_new_names_are_free_in_all_bodies() -> None:
    names = Names(graph(BRANCH))
    assert [names.new(wish) for wish in ("z", "z", "x", "u", "e", "w")] == [
        "z",
        "z_",
        "x_",
        "u_",
        "e_",
        "w_",
    ]


def test_numbered_names_are_short_and_free_in_all_bodies() -> None:
    model = graph(BRANCH.replace("u = Add(a, w)", "t1 = Add(a, w)").replace("Relu(u)", "Relu(t1)"))
    names = Names(model)
    assert [names.number("t") for _ in range(3)] == ["t0", "t2", "t3"]
    assert [names.number("c") for _ in range(2)] == ["c0", "c1"]
    assert names.new("c2") == "c2"
    assert [names.number("c") for _ in range(2)] == ["c3", "c4"]
    assert names.new("t0") == "t0_"
    assert names.number("t") == "t4"
    assert Names(model).number("t") == "t0"


def test_metadata_can_be_added_to_any_graph_and_to_its_copies() -> None:
    model = gs.Graph()
    metadata(model)["a"] = "b"
    assert metadata(model) == {"a": "b"}
    copy = with_metadata(model.copy(), model)
    metadata(copy)["c"] = "d"
    assert (metadata(copy), metadata(model)) == ({"a": "b", "c": "d"}, {"a": "b"})


# Types


@pytest.mark.parametrize("name", ["float16", "bfloat16", "double"])
def test_other_floats_are_refused(name: str) -> None:
    text = f"{HEADER} g (float[3] x) => ({name}[3] y) {{ y = Cast<to = {{}}>(x) }}"
    number = onnx.TensorProto.DataType.Value(name.upper())
    model = graph(text.replace("{}", str(number)))
    with pytest.raises(IntqError, match=f"tensor 'y' is {name}; expected a float32 model; export"):
        require_float32(model)


def test_other_floats_are_found_in_bodies() -> None:
    model = graph(BRANCH)
    require_float32(model)
    body = list(subgraphs(model))[1]
    body.nodes[0].outputs[0].dtype = np.dtype(np.float16)
    with pytest.raises(IntqError, match="tensor 'u' is float16"):
        require_float32(model)


def test_element_types() -> None:
    model = graph(BRANCH)
    assert element_type(tensor(model, "x")) == onnx.TensorProto.FLOAT
    assert element_type(node(model, "body1_Add_0").inputs[1]) == onnx.TensorProto.FLOAT
    assert element_type(tensor(model, "q")) == onnx.TensorProto.BOOL
    assert element_type(gs.Variable("unknown")) is None
    assert element_type(gs.Variable("b", onnx.TensorProto.BFLOAT16)) == onnx.TensorProto.BFLOAT16


# Opsets


def test_opsets_are_raised_in_place_and_metadata_stays() -> None:
    body = """a = Unsqueeze<axes = [0]>(x)
        b = Softmax(a)
        c = Squeeze<axes = [0]>(b)
        y = Dropout<ratio = 0.5>(c)"""
    model = one_node(body, opset=11)
    metadata(model)["key"] = "value"
    before = outputs(model)["y"]
    convert_opset(model, 13)
    assert model.opset == 13
    assert metadata(model) == {"key": "value"}
    assert {"a", "b", "c"} <= set(model.tensors())
    onnx.checker.check_model(model_from_graph(model), full_check=True)
    np.testing.assert_allclose(outputs(model)["y"], before, rtol=1e-6)


def test_opsets_are_never_lowered() -> None:
    model = graph()
    nodes = model.nodes
    convert_opset(model, 13)
    assert model.opset == 17
    assert model.nodes is nodes


def large() -> gs.Graph:
    """A graph with 24,000 bytes of weights."""
    model = graph(f"{HEADER} g (float[2, 3] x) => (float[2, 2000] y) {{ y = MatMul(x, w) }}")
    weights = np.arange(6000, dtype=np.float32).reshape(3, 2000)
    model.nodes[0].inputs[1] = gs.Constant("w", weights)
    return model


def test_large_weights_survive_a_conversion() -> None:
    model = large()
    model.opset = 11
    model.import_domains = [onnx.helper.make_opsetid("", 11)]
    convert_opset(model, 13)
    assert [t.name for t in model.inputs] == ["x"]
    assert tensor(model, "w").values.shape == (3, 2000)


def test_bodies_are_converted_too() -> None:
    text = BRANCH.replace("t = Relu(u)", "v = Unsqueeze<axes = [0]>(u) t = Squeeze<axes = [0]>(v)")
    model = graph(text.replace('"" : 17', '"" : 11'))
    convert_opset(model, 13)
    feeds = {"x": np.array([-1, 2, -3], np.float32), "q": np.array(True)}
    found = Session(model_from_graph(model), threads=1).run(feeds)["y"]
    np.testing.assert_array_equal(found, [2, 4, 6])


def test_what_cannot_be_converted_is_told_in_one_line() -> None:
    model = one_node("y = Upsample(x, s)", opset=7)
    message = r"opset 7 cannot be raised to 13 \(.*\); export the model with opset 13 or newer"
    with pytest.raises(IntqError, match=message) as caught:
        convert_opset(model, 13)
    assert "\n" not in str(caught.value)
    assert model.opset == 7
