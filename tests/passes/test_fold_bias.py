import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import EPSILON, well_formed

FoldBias = load("fold_bias")
RANDOM = np.random.default_rng(0)
CONSTANTS = {
    "w": RANDOM.normal(0, 0.5, (4, 6)).astype(np.float32),
    "b": RANDOM.normal(0, 1, 6).astype(np.float32),
    "u": RANDOM.normal(0, 1, (2, 3)).astype(np.float32),
    "v": RANDOM.normal(0, 1, (1, 1, 2, 3)).astype(np.float32),
    "part": RANDOM.normal(0, 1, (2, 1)).astype(np.float32),
    "last": RANDOM.normal(0, 1, 3).astype(np.float32),
    "rows": RANDOM.normal(0, 1, (5, 2, 3)).astype(np.float32),
    "table": RANDOM.normal(0, 1, (5, 6)).astype(np.float32),
    "split": np.array([0, -1, 2, 3]),
    "joined": np.array([-1, 3]),
    "zero": np.array([0]),
    "minus": np.array([-1]),
    "two": np.array([2]),
    "three": np.array([3]),
}
HEADS = "p = MatMul(x, w) a = Add(p, b) h = Reshape(a, split)"


def graph(body: str, *, shapes: bool = True) -> gs.Graph:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 5, 4] x) => (float[] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    read = {name for node in model.graph.node for name in node.input}
    for name in sorted(read & set(CONSTANTS)):
        tensor = onnx.numpy_helper.from_array(CONSTANTS[name], name)
        model.graph.initializer.append(tensor)
    found = graph_from_model(model)
    for node in found.nodes[:-1] if not shapes else ():
        node.outputs[0].shape = None
    return found


def fold(model: gs.Graph) -> tuple[int, list[str]]:
    """Fold; doing so again must change nothing, and the function must not."""
    x = RANDOM.normal(0, 1, (3, 5, 4)).astype(np.float32)

    def result() -> np.ndarray:
        return Session(model_from_graph(model), threads=1, optimize=False).run({"x": x})["y"]

    before = result()
    first, second = run(model, [FoldBias()] * 2, Context(), [well_formed])
    assert second.changes == 0
    # Sums of 6 numbers, each within an epsilon, of results up to 8, twice.
    np.testing.assert_allclose(result(), before, rtol=0, atol=100 * EPSILON)
    return first.changes, [why for _, why in first.skipped]


@pytest.mark.parametrize("values", ["u", "v", "part", "last"])
def test_a_sum_behind_a_reshape_goes_into_the_bias(values: str) -> None:
    model = graph(f"{HEADS} y = Add(h, {values})")
    assert fold(model) == (1, [])
    assert [node.op for node in model.nodes] == ["MatMul", "Add", "Reshape"]


def test_two_sums_get_a_product_each_and_share_their_weights() -> None:
    model = graph(f"{HEADS} c = Add(h, u) d = Add(v, h) y = Sub(c, d)")
    assert fold(model) == (2, [])
    weights = {id(n.inputs[1]) for n in model.nodes if n.op == "MatMul"}
    assert [n.op for n in model.nodes].count("MatMul") == 2
    assert len(weights) == 1


def test_a_computed_shape_ends_with_what_is_known_of_it() -> None:
    shape = "s = Shape(x) n = Gather(s, zero) to = Concat<axis = 0>(n, minus, two, three)"
    body = f"p = MatMul(x, w) a = Add(p, b) {shape} h = Reshape(a, to) y = Add(h, u)"
    assert fold(graph(body, shapes=False)) == (1, [])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"{HEADS} y = Add(h, rows)", "do not run along the parts"),
        ("p = MatMul(x, w) a = Add(p, b) h = Reshape(a, joined) y = Add(h, last)", "do not run"),
        (f"{HEADS} c = Add(h, u) s = Shape(h) y = Reshape(c, s)", "something else reads it"),
        ("p = MatMul(x, w) a = Add(p, table) h = Reshape(a, split) y = Add(h, u)", "no vector"),
        (
            "v2 = Relu(w) r = MatMul(x, v2) a = Add(r, b) h = Reshape(a, split) y = Add(h, u)",
            "computed",
        ),
    ],
)
def test_it_declines(body: str, why: str) -> None:
    changes, reasons = fold(graph(body))
    assert changes == 0
    assert why in reasons[0]


@pytest.mark.parametrize(
    "body",
    [
        f"{HEADS} c = Add(h, u) y = Sub(c, h)",
        "h = Reshape(x, zero) y = Relu(x)",
        "p = MatMul(x, w) h = Reshape(p, split) y = Add(h, u)",
        f"{HEADS} y = Add(h, h)",
    ],
)
def test_other_reshapes_are_none_of_its_business(body: str) -> None:
    model = graph(body.replace("h = Reshape(x, zero) ", ""))
    assert fold(model) == (0, [])
