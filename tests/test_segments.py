import numpy as np
import onnx
import pytest

from onnx_intq.feeds import Batch
from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.runtime import Session
from onnx_intq.segments import Segments, cut

DIAMOND = """<ir_version: 8, opset_import: ["" : 17]>
    diamond (float[n, 4] x, int64[n] length) => (float[n, 4] y)
    <float[4, 4] w = {1, 0, 2, 0, 0, 1, 0, 1, 3, 0, 1, 0, 0, 2, 0, 1}> {
        a = MatMul(x, w)
        b = Relu(a)
        rows = Shape(b)
        c = Neg(a)
        d = MatMul(b, w)
        e = Add(d, c)
        f = Add(e, x)
        y = Reshape(f, rows)
        dead = Exp(a)
    }"""
BRANCH = """<ir_version: 8, opset_import: ["" : 17]>
    branch (float[4] x, bool take) => (float[4] y) {
        a = Abs(x)
        b = Neg(a)
        c = If(take) <
            then_branch = yes () => (float[4] t) { u = Add(a, b) t = Add(u, x) },
            else_branch = no () => (float[4] e) { e = Neg(b) }
        >
        y = Relu(c)
    }"""
UNTYPED = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    untyped (float[4] x) => (float[4] y) {
        a = Abs(x)
        b = com.microsoft.Gelu(a)
        y = Neg(b)
    }"""


def expected(text: str, names: list[str], batch: Batch) -> Batch:
    """The values a session gives that has all tensors as outputs."""
    graph = graph_from_model(onnx.parser.parse_model(text))
    made = {t.name: t for node in graph.nodes for t in node.outputs}
    graph.outputs = [made[name] for name in names]
    return Session(model_from_graph(graph), threads=1, optimize=False).run(batch)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_every_tensor_has_the_value_it_has_in_the_whole_graph(size: int) -> None:
    graph = graph_from_model(onnx.parser.parse_model(DIAMOND))
    names = ["a", "b", "c", "d", "e", "f", "y"]
    batch: Batch = {
        "x": np.arange(8, dtype=np.float32).reshape(2, 4) - 3,
        "length": np.ones(2, np.int64),
    }
    segments = Segments(graph, [*names, "x"], size=size, threads=1)
    for _ in range(2):
        found = list(segments.run(batch))
        assert [name for name, _ in found] == ["x", *names]
        for name, values in expected(DIAMOND, names, batch).items():
            # Small integers: float32 is exact, in whatever order operators are fused.
            np.testing.assert_array_equal(dict(found)[name], values)


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("take", [True, False])
def test_bodies_may_read_tensors_of_earlier_parts(size: int, take: bool) -> None:
    graph = graph_from_model(onnx.parser.parse_model(BRANCH))
    batch: Batch = {"x": np.array([-1, 2, -3, 4], np.float32), "take": np.array(take)}
    names = ["a", "b", "c", "y"]
    found = dict(Segments(graph, names, size=size, threads=1).run(batch))
    for name, values in expected(BRANCH, names, batch).items():
        np.testing.assert_array_equal(found[name], values)


def test_nodes_may_come_in_any_order() -> None:
    graph = graph_from_model(onnx.parser.parse_model(DIAMOND))
    graph.nodes.reverse()
    batch: Batch = {"x": np.eye(4, dtype=np.float32), "length": np.ones(4, np.int64)}
    found = dict(Segments(graph, ["y"], threads=1).run(batch))
    np.testing.assert_array_equal(found["y"], expected(DIAMOND, ["y"], batch)["y"])
    assert graph.nodes[0].op == "Exp"


def test_the_graph_is_left_as_it_was() -> None:
    graph = graph_from_model(onnx.parser.parse_model(DIAMOND))
    before = model_from_graph(graph).SerializeToString(deterministic=True)
    Segments(graph, ["a", "e"], size=1, threads=1)
    assert model_from_graph(graph).SerializeToString(deterministic=True) == before


def test_parts_hold_the_asked_number_of_tensors_and_only_needed_nodes() -> None:
    graph = graph_from_model(onnx.parser.parse_model(DIAMOND))
    parts = cut(graph, ["a", "c", "e"], size=2)
    assert [[node.op for node in part.nodes] for part in parts] == [
        ["MatMul", "Relu", "Neg"],
        ["MatMul", "Add"],
    ]
    assert list(parts[0].outputs) == ["a", "c", "b"]
    assert set(parts[1].inputs) == {"b", "c"}


def test_tensors_of_unknown_type_keep_the_graph_in_one_part() -> None:
    graph = graph_from_model(onnx.parser.parse_model(UNTYPED))
    assert len(cut(graph, ["a", "y"], size=1)) == 1
    batch: Batch = {"x": np.array([-1, 0, 1, 2], np.float32)}
    found = dict(Segments(graph, ["a", "y"], size=1, threads=1).run(batch))
    np.testing.assert_array_equal(found["a"], [1, 0, 1, 2])


def test_without_tensors_nothing_runs() -> None:
    graph = graph_from_model(onnx.parser.parse_model(DIAMOND))
    batch: Batch = {"x": np.ones((2, 4), np.float32), "length": np.ones(2, np.int64)}
    assert not list(Segments(graph, [], threads=1).run(batch))
    assert [name for name, _ in Segments(graph, ["x"], threads=1).run(batch)] == ["x"]
