import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model, model_from_graph, subgraphs
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import SameFunction, well_formed

DropIdentity = load("drop_identity")
X = np.array([[-2, 0.5, 1], [3, -4, 5]], np.float32)
ROUNDED = "joins a graph output to a tensor that must keep its own name"


def graph(
    body: str, inputs: str = "float[2, 3] x", outputs: str = "float[2, 3] y", opset: int = 17
) -> gs.Graph:
    text = f"""<ir_version: 8, opset_import: ["" : {opset}, "other" : 1]>
        g ({inputs}) => ({outputs}) <float half = {{0.5}}, bool yes = {{1}}, bool no = {{0}}>
        {{ {body} }}"""
    return graph_from_model(onnx.parser.parse_model(text))


def ops(model: gs.Graph) -> list[str]:
    return [node.op for sub in subgraphs(model) for node in sub.nodes]


def drop(model: gs.Graph, **more: np.ndarray) -> tuple[int, list[tuple[str, str]]]:
    """Drop, check that the function stays, and that dropping again changes nothing."""
    same, ctx = SameFunction({"x": X, **more}), Context()
    same.start(model)
    first, second = run(model, [DropIdentity()] * 2, ctx, [well_formed, same])
    assert second.changes == 0
    assert second.skipped == first.skipped
    return first.changes, list(first.skipped)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Identity(x) y = Relu(a)", ["Relu"]),
        ("a = Relu(x) y = Identity(a)", ["Relu"]),
        ("a = Relu(x) b = Identity(a) c = Identity(b) y = Identity(c)", ["Relu"]),
        ("a = Relu(x) b = Identity(a) y = Mul(b, b)", ["Relu", "Mul"]),
        ("a = Dropout(x) y = Relu(a)", ["Relu"]),
        ("a = Dropout(x, half) y = Relu(a)", ["Relu"]),
        ("a = Dropout(x, half, no) y = Relu(a)", ["Relu"]),
        ("a, m = Dropout(x, half, ) y = Relu(a)", ["Relu"]),
        ("a = Cast<to = 1>(x) y = Relu(a)", ["Relu"]),
        ("a = Transpose<perm = [0, 1]>(x) y = Relu(a)", ["Relu"]),
    ],
)
def test_fires(body: str, left: list[str]) -> None:
    model = graph(body)
    before = ops(model)
    assert drop(model) == (len(before) - len(left), [])
    assert ops(model) == left
    assert [t.name for t in model.outputs] == ["y"]


def test_old_dropouts_go_too() -> None:
    model = graph("a = Dropout<ratio = 0.5>(x) y = Relu(a)", opset=11)
    assert drop(model) == (1, [])


@pytest.mark.parametrize("q", [True, False])
def test_bodies_lose_theirs(q: bool) -> None:
    body = """a = Relu(x) b = Identity(a)
        y = If(q) <
            then_branch = yes () => (float[2, 3] t) { c = Identity(b) d = Neg(c) t = Identity(d) },
            else_branch = no () => (float[2, 3] e) { e = Identity(a) }
        >"""
    model = graph(body, "float[2, 3] x, bool q")
    joined = [("body2_Identity_0", "joins a body's output to a tensor outside the body")]
    assert drop(model, q=np.array(q)) == (3, joined)
    assert ops(model) == ["Relu", "If", "Neg", "Identity"]


@pytest.mark.parametrize(
    ("body", "outputs", "why"),
    [
        ("y = Identity(x)", "float[2, 3] y", ROUNDED),
        ("y = Identity(half)", "float y", ROUNDED),
        ("y = Relu(x) z = Identity(y)", "float[2, 3] y, float[2, 3] z", ROUNDED),
    ],
)
def test_declines_what_only_gives_an_output_its_name(body: str, outputs: str, why: str) -> None:
    model = graph(body, outputs=outputs)
    assert drop(model) == (0, [(model.nodes[-1].name, why)])


def test_one_of_two_outputs_of_the_same_value_goes() -> None:
    model = graph(
        "a = Relu(x) y = Identity(a) z = Identity(a)", outputs="float[2, 3] y, float[2, 3] z"
    )
    assert drop(model) == (1, [("Identity_2", ROUNDED)])
    found = Session(model_from_graph(model), threads=1).run({"x": X})
    assert list(found) == ["y", "z"]
    np.testing.assert_array_equal(found["y"], found["z"])


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("a, y = Dropout(x)", "bool[2, 3] y"),
        ("a, m = Dropout(x) b = Cast<to = 1>(m) y = Add(a, b)", "float[2, 3] y"),
        ("a = Cast<to = 6>(x) y = Cast<to = 1>(a)", "float[2, 3] y"),
        ("a = Transpose<perm = [1, 0]>(x) y = Transpose(a)", "float[2, 3] y"),
        ("a = Dropout(x, half, q) y = Relu(a)", "float[2, 3] y"),
    ],
)
def test_leaves_alone_what_does_something(body: str, outputs: str) -> None:
    model = graph(body, "float[2, 3] x, bool q", outputs)
    before = ops(model)
    assert drop(model, q=np.array(False)) == (0, [])
    assert ops(model) == before


@pytest.mark.parametrize("body", ["y = Dropout(x, half, yes)", "y = other.Identity(x)"])
def test_leaves_alone_what_may_do_something(body: str) -> None:
    model = graph(f"{body} z = Relu(y)", outputs="float[2, 3] z")
    assert DropIdentity().run(model, Context()) == 0
