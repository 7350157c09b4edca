"""Graphs from and to models and files; `test_graph.py` edits them in memory."""

import errno
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import (
    MAX_IR,
    bare_model,
    constant,
    file_bytes,
    graph_from_model,
    load,
    metadata,
    model_from_graph,
    save,
    sha256,
    subgraphs,
    weight_bytes,
)
from onnx_intq.hollow import Hollow
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


def tensor(model: gs.Graph, name: str) -> gs.Tensor:
    return model.tensors()[name]


def outputs(model: gs.Graph) -> dict[str, np.ndarray]:
    return Session(model_from_graph(model), threads=1, optimize=False).run(FEEDS)


def large() -> gs.Graph:
    """A graph with 24,000 bytes of weights."""
    text = f"{HEADER} g (float[2, 3] x) => (float[2, 2000] y) {{ y = MatMul(x, w) }}"
    model = graph_from_model(onnx.parser.parse_model(text))
    weights = np.arange(6000, dtype=np.float32).reshape(3, 2000)
    model.nodes[0].inputs[1] = gs.Constant("w", weights)
    return model


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_what_is_saved_loads_back(tmp_path: Path, limit: int) -> None:
    model, path = graph(), tmp_path / "m.onnx"
    metadata(model)["key"] = "value"
    save(model, path, limit)
    again = load(path)
    assert [n.op for n in again.nodes] == ["Add", "Relu", "Mul"]
    assert metadata(again) == {"key": "value"}
    np.testing.assert_array_equal(outputs(again)["y"], outputs(model)["y"])
    assert [t.shape for n in again.nodes for t in n.outputs] == [[2, 3]] * 3


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_the_same_graph_gives_the_same_bytes(tmp_path: Path, limit: int) -> None:
    contents = []
    for order in (("a", "b"), ("b", "a")):
        model = large()
        metadata(model).update(dict.fromkeys(order, "value"))
        save(model, tmp_path / "m.onnx", limit)
        contents.append([part.read_bytes() for part in sorted(tmp_path.iterdir())])
    assert contents[0] == contents[1]
    save(load(tmp_path / "m.onnx"), tmp_path / "m.onnx", limit)
    assert contents[0] == [part.read_bytes() for part in sorted(tmp_path.iterdir())]


def test_weights_above_the_limit_lie_beside_the_model(tmp_path: Path) -> None:
    model, path = large(), tmp_path / "m.onnx"
    assert weight_bytes(model) == 24_000
    save(model, path, 24_001)
    assert list(tmp_path.iterdir()) == [path]
    whole = file_bytes(path)
    save(model, path, 24_000)
    data = tmp_path / "m.onnx.data"
    assert sorted(tmp_path.iterdir()) == [path, data]
    assert data.stat().st_size == 24_000
    assert abs(file_bytes(path) - whole) < 200
    np.testing.assert_array_equal(outputs(load(path))["y"], outputs(model)["y"])
    before = sha256(path)
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    assert sha256(path) != before


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_full_disk_leaves_the_old_files_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    path = tmp_path / "m.onnx"
    save(large(), path, limit)
    before = {part: part.read_bytes() for part in tmp_path.iterdir()}

    def write(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Hollow, "write", write)
    monkeypatch.setattr(onnx, "save_model", write)
    with pytest.raises(IntqError, match=r"cannot be written: No space left.*nothing was left"):
        save(graph(), path, limit)
    monkeypatch.undo()
    assert {part: part.read_bytes() for part in tmp_path.iterdir()} == before


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_files_that_cannot_be_written_are_told(tmp_path: Path, limit: int) -> None:
    with pytest.raises(IntqError, match=r"cannot be written: No such file or directory"):
        save(large(), tmp_path / "no" / "m.onnx", limit)
    with pytest.raises(IntqError, match=r"is a folder; expected a file's name; change -o"):
        save(large(), tmp_path, limit)
    assert not list(tmp_path.iterdir())
    assert not tmp_path.with_name(tmp_path.name + ".data").exists()


def test_missing_or_short_external_weights_are_told(tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    save(large(), path, 0)
    data.write_bytes(data.read_bytes()[:100])
    message = r"its external weights cannot be read \(.*\); expected them beside the model"
    with pytest.raises(IntqError, match=message):
        load(path)
    data.unlink()
    with pytest.raises(IntqError, match=message):
        load(path)


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    invalid = onnx.parser.parse_model(MODEL.replace("Relu", "Nope")).SerializeToString()
    empty = onnx.parser.parse_model(MODEL)
    del empty.graph.node[:]
    for content, message in (
        (b"", "no nodes or no opset"),
        (b"import this\n" * 9, "expected a protobuf ModelProto"),
        (invalid, "invalid ONNX: No Op registered for Nope"),
        (invalid[:-20], "not an ONNX model"),
        (empty.SerializeToString(), "no nodes or no opset"),
    ):
        path.write_bytes(content)
        with pytest.raises(IntqError, match=f"m.onnx: .*{message}") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(IntqError, match=r"no such file; expected an ONNX model; check the path"):
        load(tmp_path / "other.onnx")
    with pytest.raises(IntqError, match=r"is a folder; expected an ONNX model; name a file in it"):
        load(tmp_path)


# Export


@pytest.mark.parametrize(
    ("given", "opset", "written"), [(3, 11, 8), (8, 17, 8), (9, 17, 9), (13, 21, 13), (14, 17, 13)]
)
def test_the_ir_version_is_one_that_runtimes_read(given: int, opset: int, written: int) -> None:
    proto = onnx.parser.parse_model(MODEL.replace('"" : 17', f'"" : {opset}'))
    proto.ir_version = given
    found = model_from_graph(graph_from_model(proto)).ir_version
    assert found == written <= MAX_IR


def test_newer_opsets_need_a_newer_ir_version() -> None:
    assert model_from_graph(graph(MODEL.replace('"" : 17', '"" : 21'))).ir_version == 10


def test_shapes_that_can_be_inferred_again_are_not_stored() -> None:
    model = model_from_graph(graph())
    assert not model.graph.value_info
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[3] x) => (float[3] y) { a = com.microsoft.Gelu(x) y = Neg(a) }"""
    foreign = onnx.parser.parse_model(text)
    foreign.graph.value_info.append(onnx.helper.make_tensor_value_info("a", 1, [3]))
    model = model_from_graph(graph_from_model(foreign))
    assert [value.name for value in model.graph.value_info] == ["a"]


# Import


def with_constant(attribute: str) -> gs.Graph:
    body = f"c = Constant<{attribute}>() d = Shape(c) y = Abs(x)"
    return graph(f"{HEADER} g (float[2, 3] x) => (float[2, 3] y) {{ {body} }}")


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("value = int8[2] {1, 2}", np.array([1, 2], np.int8)),
        ("value_float = 1.5", np.float32(1.5)),
        ("value_floats = [1.5, 2.0]", np.array([1.5, 2], np.float32)),
        ("value_int = 3", np.int64(3)),
        ("value_ints = [3, 4]", np.array([3, 4], np.int64)),
    ],
)
def test_constant_nodes_become_initializers(attribute: str, expected: np.ndarray) -> None:
    model = with_constant(attribute)
    found = constant(model.nodes[0], 0)
    assert [n.op for n in model.nodes] == ["Shape", "Abs"]
    assert found is not None
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("attribute", ['value_string = "a"', 'value_strings = ["a", "b"]'])
def test_texts_stay_constant_nodes(attribute: str) -> None:
    model = with_constant(attribute)
    assert [n.op for n in model.nodes] == ["Constant", "Shape", "Abs"]


def test_constants_in_bodies_and_among_outputs_are_lifted() -> None:
    text = f"""{HEADER} g (float[2, 3] x, bool q) => (float[2, 3] y, float z) {{
        z = Constant<value_float = 2.0>()
        y = If(q) <
            then_branch = yes () => (float[2, 3] t) {{
                c = Constant<value_float = 1.0>()
                t = Add(x, c)
            }},
            else_branch = no () => (float[2, 3] e) {{ e = Mul(x, z) }}
        >
    }}"""
    model = graph(text)
    assert [n.op for sub in subgraphs(model) for n in sub.nodes] == ["If", "Add", "Mul"]
    session = Session(model_from_graph(model), threads=1)
    for q, expected in (True, FEEDS["x"] + 1), (False, FEEDS["x"] * 2):
        found = session.run({**FEEDS, "q": np.array(q)})
        np.testing.assert_array_equal(found["y"], expected)
        assert found["z"] == 2


def test_nodes_get_names_and_given_ones_stay() -> None:
    proto = onnx.parser.parse_model(MODEL)
    first, second, third = proto.graph.node
    third.name, second.name, first.name = "Add_0", "same", ""
    assert [n.name for n in graph_from_model(proto).nodes] == ["Add_0_", "same", "Add_0"]
    third.name = "same"
    assert [n.name for n in graph_from_model(proto).nodes] == ["Add_0", "same", "Mul_2"]


def test_nodes_in_bodies_get_names_of_their_own() -> None:
    names = [[n.name for n in sub.nodes] for sub in subgraphs(graph(BRANCH))]
    assert names[0] == ["Abs_0", "Neg_1", "If_2"]
    assert names[1:] == [["body1_Add_0", "body1_Relu_1"], ["body2_Add_0", "body2_Abs_1"]]


def test_functions_are_written_out() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[2, 3] x) => (float[2, 3] y) { a = local.f(x) y = local.f(a) }
        <domain: "local", opset_import: ["" : 17]> f (a) => (b) { c = Relu(a) b = Neg(c) }"""
    model = graph(text)
    assert [n.op for n in model.nodes] == ["Relu", "Neg"] * 2
    np.testing.assert_array_equal(outputs(model)["y"], np.zeros((2, 3)))


def test_functions_of_unknown_domains_are_refused_in_one_line(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
        g (float[4] x) => (float[4] y) { y = f.twice(x) }
        <domain: "f", opset_import: ["" : 17, "own" : 1]> twice (a) => (b) { b = own.Double(a) }"""
    model = onnx.parser.parse_model(text)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(IntqError, match=r"/m\.onnx: shapes cannot be inferred \(.*own.*; export"):
        load(tmp_path / "m.onnx")
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    assert [node.op for node in graph_from_model(model).nodes] == ["Double"]


def test_large_weights_are_no_hindrance_to_shapes_and_types() -> None:
    proto = onnx.parser.parse_model(
        f"{HEADER} g (float[n, 3] x) => (float[n, m] y) {{ a = MatMul(x, w) y = Relu(a) }}"
    )
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones((3, 2000), np.float32), "w")
    )
    bare = bare_model(proto)
    assert not bare.graph.initializer
    assert [value.name for value in bare.graph.input] == ["x", "w"]
    assert bare.ByteSize() < 300
    onnx.checker.check_model(bare, full_check=True)
    model = graph_from_model(proto)
    assert [t.name for t in model.inputs] == ["x"]
    assert (tensor(model, "a").shape, tensor(model, "a").dtype) == (["n", 2000], np.float32)
    assert tensor(model, "w").values.sum() == 6000


def test_small_constants_take_part_in_inference() -> None:
    text = f"""{HEADER} g (float[2, 3] x) => (float[p, q] y) <int64[2] s = {{3, 2}}> {{
        a = Reshape(x, s)
        y = Relu(a)
    }}"""
    assert tensor(graph(text), "a").shape == [3, 2]


def test_weights_that_are_inputs_too_stay_so() -> None:
    text = (
        f"{HEADER} g (float[2, 3] x, float[3, 2000] w) => (float[2, 2000] y) {{ y = MatMul(x, w) }}"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones((3, 2000), np.float32), "w")
    )
    assert [value.name for value in bare_model(proto).graph.input] == ["x", "w"]
    assert [t.name for t in graph_from_model(proto).inputs] == ["x"]
