import re
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import EPSILON, well_formed

FoldScale = load("fold_scale")
RANDOM = np.random.default_rng(0)
CONSTANTS: dict[str, Any] = {
    "w": RANDOM.normal(0, 0.5, (4, 6)).astype(np.float32),
    "k": RANDOM.normal(0, 0.5, (6, 4, 3)).astype(np.float32),
    "b": RANDOM.normal(0, 1, 6).astype(np.float32),
    "half": np.float32(0.5),
    "one": np.full(1, 0.3, np.float32),
    "cube": np.full((1, 1, 1, 1), 0.3, np.float32),
    "none": np.float32(0),
    "several": np.full(6, 0.5, np.float32),
    "split": np.array([0, -1, 2, 3]),
}
PRODUCT = "p = MatMul(x, w) a = Add(p, b)"


def graph(body: str) -> gs.Graph:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 5, 4] x) => (float[] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for name, values in CONSTANTS.items():
        if re.search(rf"\b{name}\b", body):
            tensor = onnx.numpy_helper.from_array(np.asarray(values), name)
            model.graph.initializer.append(tensor)
    return graph_from_model(model)


def fold(model: gs.Graph) -> tuple[int, list[str]]:
    """Fold; doing so again must change nothing, and the function must not."""
    x = RANDOM.normal(0, 1, (3, 5, 4)).astype(np.float32)

    def result() -> np.ndarray:
        return Session(model_from_graph(model), threads=1, optimize=False).run({"x": x})["y"]

    before = result()
    first, second = run(model, [FoldScale()] * 2, Context(), [well_formed])
    assert second.changes == 0
    # Sums of 12 products, each within an epsilon, of results up to 8.
    np.testing.assert_allclose(result(), before, rtol=0, atol=100 * EPSILON)
    return first.changes, [why for _, why in first.skipped]


@pytest.mark.parametrize(
    "body",
    [
        f"{PRODUCT} y = Mul(a, half)",
        f"{PRODUCT} y = Mul(half, a)",
        f"{PRODUCT} y = Div(a, one)",
        "p = MatMul(x, w) y = Mul(p, half)",
        "p = MatMul(x, w) r = Reshape(p, split) t = Transpose(r) y = Mul(t, half)",
        "t = Transpose<perm = [0, 2, 1]>(x) p = Conv(t, k, b) y = Mul(p, half)",
        "f = Flatten<axis = 2>(x) p = Gemm(f, w, b) y = Mul(p, one)",
    ],
)
def test_a_factor_goes_into_weights_and_bias(body: str) -> None:
    model = graph(body)
    assert fold(model) == (1, [])
    assert {"Mul", "Div"}.isdisjoint(node.op for node in model.nodes)


def test_a_half_keeps_every_bit() -> None:
    model = graph(f"{PRODUCT} y = Mul(a, half)")
    fold(model)
    weights = next(n.inputs[1].values for n in model.nodes if n.op == "MatMul")
    np.testing.assert_array_equal(weights, CONSTANTS["w"] / 2)


def test_what_asks_for_a_shape_does_not_count_as_a_reader() -> None:
    body = f"{PRODUCT} s = Shape(a) m = Mul(a, half) r = Reshape(m, s) y = Relu(r)"
    model = graph(body)
    assert fold(model) == (1, [])
    assert next(n for n in model.nodes if n.op == "Shape").inputs[0].name == "m"


def test_the_result_keeps_its_name_and_what_is_between_loses_its_own() -> None:
    model = graph(f"{PRODUCT} m = Mul(a, half) y = Relu(m)")
    fold(model)
    assert [node.outputs[0].name for node in model.nodes] == ["p_scaled", "m", "y"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = Mul(x, half)", "made by no operator with weights"),
        (f"{PRODUCT} r = Relu(a) y = Mul(r, half)", "made by no operator with weights"),
        (f"{PRODUCT} m = Mul(a, half) y = Sub(m, a)", "or read elsewhere too"),
        ("t = Transpose<perm = [0, 2, 1]>(x) p = MatMul(x, t) y = Mul(p, half)", "are computed"),
        (f"{PRODUCT} m = Mul(a, half) q = MatMul(x, w) y = Add(m, q)", "read elsewhere too"),
        ("v = Relu(w) f = Flatten<axis = 2>(x) p = Gemm(f, v, b) y = Mul(p, half)", "computed"),
    ],
)
def test_it_declines(body: str, why: str) -> None:
    changes, reasons = fold(graph(body))
    assert changes == 0
    assert why in reasons[0]


@pytest.mark.parametrize(
    "body",
    [
        f"{PRODUCT} y = Mul(a, none)",
        f"{PRODUCT} y = Mul(a, several)",
        f"{PRODUCT} y = Mul(a, cube)",
        f"{PRODUCT} y = Div(half, a)",
        f"{PRODUCT} y = Mul(a, a)",
        "y = Mul(half, one)",
    ],
)
def test_other_products_are_none_of_its_business(body: str) -> None:
    assert fold(graph(body)) == (0, [])
