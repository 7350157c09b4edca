"""Models without their weights: nothing copied, and the same bytes, values and results."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, hollow_from_graph, load, model_from_graph, save
from onnx_intq.hollow import SMALL, Hollow, hollow, hollowed, is_hollow
from onnx_intq.runtime import Session

BODY = """<ir_version: 8, opset_import: ["" : 17]>
    m (float[64, n] x, bool c) => (float[64, n] z) {
        y = MatMul(w, x)
        z = If (c) <
            then_branch = t () => (float[64, n] a) { a = MatMul(w, y) },
            else_branch = e () => (float[64, n] b) { b = Neg(y) }
        >
    }"""
"""A weight that a body reads too."""


def model(kind: str = "float32", *, rows: int = 64, seed: int = 0) -> onnx.ModelProto:
    """A product whose constant weight [rows, 64] is cast, if it is no float."""
    code = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    found = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        m (float[64, n] x) => (float[{rows}, n] y) {{
            f = Cast<to = 1>(w)
            y = MatMul(f, x)
        }}""")
    values = np.random.default_rng(seed).integers(0, 2, (rows, 64)).astype(kind)
    tensor = onnx.numpy_helper.from_array(values, "w")
    assert tensor.data_type == code
    found.graph.initializer.append(tensor)
    onnx.helper.set_model_props(found, {"b": "2", "a": "1"})
    return found


def bodied() -> onnx.ModelProto:
    found = onnx.parser.parse_model(BODY)
    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    found.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    return found


def exported(graph: gs.Graph) -> Hollow:
    return hollow_from_graph(graph)


@given(
    kind=st.sampled_from(["float32", "float64", "int8", "uint8", "int32", "int64", "bool"]),
    rows=st.sampled_from([1, 15, 16, 17, 40, 300]),
)
def test_written_bytes_are_protobufs(
    tmp_path_factory: pytest.TempPathFactory, kind: str, rows: int
) -> None:
    path = tmp_path_factory.mktemp("hollow") / "m.onnx"
    graph = graph_from_model(model(kind, rows=rows))
    exported(graph).write(path)
    assert path.read_bytes() == model_from_graph(graph).SerializeToString(deterministic=True)
    (weight,) = onnx.load(path).graph.initializer
    wanted = onnx.numpy_helper.to_array(model(kind, rows=rows).graph.initializer[0])
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(weight), wanted)


def test_large_weights_stay_where_they_are() -> None:
    graph = graph_from_model(model())
    found = hollow(graph)
    assert found.weights["w"] is graph.tensors()["w"].values
    assert is_hollow(found.model.graph.initializer[0])
    assert found.model.ByteSize() < SMALL


def test_small_weights_stay_in_the_model() -> None:
    found = hollow(graph_from_model(model(rows=16)))
    assert not found.weights
    assert not is_hollow(found.model.graph.initializer[0])


def test_types_below_a_byte_stay_in_the_model() -> None:
    proto = model()
    proto.graph.initializer[0].CopyFrom(
        onnx.helper.make_tensor("w", onnx.TensorProto.INT4, (64, 64), np.ones(4096, np.int8))
    )
    assert not hollowed(proto).weights
    graph = graph_from_model(proto)
    assert not hollow(graph).weights
    assert model_from_graph(graph).graph.initializer[0].data_type == onnx.TensorProto.INT4
    assert (graph.tensors()["w"].values == 1).all()


def test_hollowed_model_is_a_copy() -> None:
    proto = model()
    found = hollowed(proto)
    assert proto == model()
    assert found.weights["w"].flags.writeable
    assert found.filled() == proto


def test_nothing_of_a_file_stays_in_memory(tmp_path: Path) -> None:
    """A reference to a part of a ModelProto would keep all of it."""
    onnx.save(model(), tmp_path / "m.onnx")
    graph = load(tmp_path / "m.onnx")
    assert isinstance(vars(graph.tensors()["w"])["_values"], np.ndarray)
    assert type(graph.import_domains) is list


def test_bodies_that_read_a_weight_keep_it(tmp_path: Path) -> None:
    proto = bodied()
    save(graph_from_model(proto), tmp_path / "m.onnx")
    x = np.random.default_rng(1).standard_normal((64, 3)).astype(np.float32)
    for chosen in (True, False):
        feeds = {"x": x, "c": np.array(chosen)}
        wanted = Session(proto, threads=1).run(feeds)["z"]
        sources = (tmp_path / "m.onnx", exported(graph_from_model(proto)))
        for source in sources:
            np.testing.assert_array_equal(Session(source, threads=1).run(feeds)["z"], wanted)


@given(kind=st.sampled_from(["float32", "int8", "uint8", "bool"]))
def test_sessions_read_the_weights_where_they_are(kind: str) -> None:
    graph = graph_from_model(model(kind))
    x = np.random.default_rng(1).standard_normal((64, 3)).astype(np.float32)
    wanted = Session(model(kind), threads=1).run({"x": x})["y"]
    found = Session(exported(graph), threads=1).run({"x": x})["y"]
    np.testing.assert_array_equal(found, wanted)


def test_graph_is_as_before() -> None:
    graph = graph_from_model(model())
    before = graph.tensors()["w"].values
    hollow(graph)
    assert graph.tensors()["w"].values is before


ONLY_IN_BODY = BODY.replace("y = MatMul(w, x)", "y = Neg(x)")


def test_a_weight_that_only_a_body_reads_is_read() -> None:
    proto = onnx.parser.parse_model(ONLY_IN_BODY)
    proto.graph.initializer.append(bodied().graph.initializer[0])
    feeds = {"x": np.ones((64, 2), np.float32), "c": np.array(True)}
    wanted = Session(proto, threads=1).run(feeds)["z"]
    found = Session(model_from_graph(graph_from_model(proto)), threads=1).run(feeds)["z"]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize("kind", ["uint4", "int4", "uint2", "int2"])
def test_several_values_go_into_a_byte(kind: str, rows: int, tmp_path: Path) -> None:
    """graphsurgeon cannot write such constants itself."""
    values = np.random.default_rng(0).integers(0, 2, (rows, 65)).astype(getattr(ml_dtypes, kind))
    proto = onnx.parser.parse_model(f"""<ir_version: 13, opset_import: ["" : 25]>
        m (float[65, n] x, bool c) => (float[{rows}, n] z, float[{rows}, n] y) {{
            f = Cast<to = 1>(w)
            y = MatMul(f, x)
            z = If (c) <
                then_branch = t () => (float[{rows}, n] a) {{
                    g = Cast<to = 1>(w)
                    a = MatMul(g, x)
                }},
                else_branch = e () => (float[{rows}, n] b) {{ b = Neg(y) }}
            >
        }}""")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    graph = graph_from_model(proto)
    w = graph.tensors()["w"]
    w.values = w.values.copy()  # in NumPy, one to a byte
    save(graph, tmp_path / "m.onnx")
    assert np.array_equal(w.values, values)
    (tensor,) = onnx.load(tmp_path / "m.onnx").graph.initializer
    assert len(tensor.raw_data) == -(-rows * 65 // (8 // int(kind[-1])))
    assert np.array_equal(onnx.numpy_helper.to_array(tensor), values)
    feeds = {"x": np.ones((65, 2), np.float32), "c": np.array(True)}
    for source in (tmp_path / "m.onnx", exported(load(tmp_path / "m.onnx"))):
        found = Session(source, threads=1).run(feeds)
        assert np.array_equal(found["y"], values.astype(np.float32) @ feeds["x"])
        assert np.array_equal(found["z"], found["y"])
