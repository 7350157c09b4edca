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

MoveMask = load("move_mask")
CONSTANTS: dict[str, Any] = {
    "low": np.float32(-10000),
    "near": np.float32(-9),
    "zero": np.float32(0),
    "one": np.float32(1),
    "axes": np.array([1]),
    "other": np.array([-3]),
    "axes_again": np.array([1]),
}
BOTH = "a = Unsqueeze(m, axes) b = Unsqueeze(m, {})"
ATTENTION = "l = Where(a, {}, s) p = Softmax(l) k = Where({}, zero, p) y = MatMul(k, v)"


def graph(body: str) -> gs.Graph:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, h, t, t] s, float[n, h, t, d] v, bool[n, t, t] m) => (float[n, h, t, d] y)
        {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    read = {name for node in model.graph.node for name in node.input}
    for name in sorted(read & set(CONSTANTS)):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.asarray(CONSTANTS[name]), name)
        )
    return graph_from_model(model)


def move(model: gs.Graph) -> tuple[int, list[str]]:
    """Move; doing so again must change nothing, and the function must not."""
    random = np.random.default_rng(0)
    masked = np.arange(7) >= np.array([7, 4])[:, None]
    feeds = {
        "s": random.normal(0, 3, (2, 3, 7, 7)).astype(np.float32),
        "v": random.normal(0, 1, (2, 3, 7, 5)).astype(np.float32),
        "m": masked[:, None, :] | masked[:, :, None],
    }
    before = Session(model_from_graph(model), threads=1).run(feeds)["y"]
    first, second = run(model, [MoveMask()] * 2, Context(), [well_formed])
    assert second.changes == 0
    after = Session(model_from_graph(model), threads=1).run(feeds)["y"]
    # Means of 7 numbers up to 3.
    np.testing.assert_allclose(after, before, rtol=0, atol=30 * EPSILON)
    return first.changes, [why for _, why in first.skipped]


@pytest.mark.parametrize(
    "body",
    [
        f"a = Unsqueeze(m, axes) {ATTENTION.format('low', 'a')}",
        f"{BOTH.format('axes')} {ATTENTION.format('low', 'b')}",
        f"{BOTH.format('axes_again')} {ATTENTION.format('low', 'b')}",
    ],
)
def test_softmax_and_product_become_neighbours(body: str) -> None:
    model = graph(body)
    assert move(model) == (1, [])
    product = next(n for n in model.nodes if n.op == "MatMul")
    assert product.inputs[0].inputs[0].op == "Softmax"
    assert model.outputs[0].inputs[0].op == "Where"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"{BOTH.format('axes')} {ATTENTION.format('near', 'b')}", "are not -1000 or less"),
        (f"{BOTH.format('other')} {ATTENTION.format('low', 'b')}", "have another mask"),
        (f"a = Unsqueeze(m, axes) b = Not(a) {ATTENTION.format('low', 'b')}", "another mask"),
        (
            "a = Unsqueeze(m, axes) p = Softmax(s) k = Where(a, zero, p) y = MatMul(k, v)",
            "logits are not masked",
        ),
        (
            f"a = Unsqueeze(m, axes) {ATTENTION.format('low', 'a')}".replace(
                "(l)", "<axis = 2>(l)"
            ),
            "does not run over the last axis",
        ),
        (
            f"a = Unsqueeze(m, axes) {ATTENTION.format('low', 'a')} z = Relu(k)",
            "read elsewhere",
        ),
    ],
)
def test_it_declines(body: str, why: str) -> None:
    changes, reasons = move(graph(body))
    assert changes == 0
    assert why in reasons[0]


def test_other_masks_are_none_of_its_business() -> None:
    body = "a = Unsqueeze(m, axes) {} p = Softmax(s) k = Where(a, {}, {}) y = MatMul(k, v)"
    assert move(graph(body.format("", "one", "p"))) == (0, [])
    assert move(graph(body.format("", "zero", "s"))) == (0, [])
