from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model
from onnx_intq.patches import patches, reason_against, rows, weight_of
from onnx_intq.runtime import Session

CASES: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = [
    ("Conv<pads = [2, 1], strides = [2]>(x, w)", (2, 4, 9), (6, 4, 3), 1),
    ("Conv<group = 2, dilations = [2], pads = [2, 2]>(x, w)", (2, 4, 9), (6, 2, 3), 1),
    ("Conv<group = 4, pads = [1, 1]>(x, w)", (2, 4, 9), (4, 1, 3), 1),
    ("Conv<pads = [1, 0, 0, 1], strides = [1, 2], dilations = [2, 1]>(x, w)",
     (2, 3, 6, 7), (5, 3, 2, 3), 1),
    ("MatMul(x, w)", (2, 3, 4), (4, 5), 1),
    ("MatMul(w, x)", (2, 4, 3), (5, 4), 0),
    ("Gemm(x, w)", (3, 4), (4, 5), 1),
    ("Gemm<transA = 1, transB = 1>(x, w)", (4, 3), (5, 4), 1),
]  # fmt: skip


def node_of(body: str, x: tuple[int, ...], w: np.ndarray) -> tuple[gs.Node, onnx.ModelProto]:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float{list(x)} x) => (float y) {{ y = {body} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    return graph_from_model(model).nodes[0], model


@pytest.mark.parametrize(("body", "x_shape", "w_shape", "index"), CASES)
def test_patches_times_rows_are_the_products_results(
    body: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...], index: int
) -> None:
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(s).astype(np.float32) for s in (x_shape, w_shape))
    node, model = node_of(body, x_shape, w)
    assert reason_against(node, w) == ""
    lines = rows(node, index, w)
    found = patches(node, index, w.shape[2:], x, 1000, 0) @ np.swapaxes(lines, 1, 2)
    y = Session(model, threads=1).run({"x": x})["y"]
    if node.op == "Conv":  # [samples, groups * outputs, *places]
        y = np.moveaxis(y, 1, -1).reshape(-1, len(lines), lines.shape[1]).transpose(1, 0, 2)
    else:
        y = (np.moveaxis(y, -2, -1) if index == 0 else y).reshape(1, -1, lines.shape[1])
    np.testing.assert_allclose(found, y, rtol=0, atol=1e-5)
    assert np.array_equal(weight_of(node, index, lines, w.shape), w)


@pytest.mark.parametrize(("body", "x_shape", "w_shape", "index"), CASES)
def test_drawn_positions_are_the_same_for_inputs_of_one_shape(
    body: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...], index: int
) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal(x_shape).astype(np.float32)
    node, _ = node_of(body, x_shape, np.zeros(w_shape, np.float32))
    kernel = w_shape[2:]
    two = [patches(node, index, kernel, values, 2, 5) for values in (x, 2 * x)]
    assert two[0].shape[1] == 2
    assert np.array_equal(2 * two[0], two[1])


@pytest.mark.parametrize(
    ("body", "x", "w", "why"),
    [
        ("ConvTranspose(x, w)", (1, 2, 4), (2, 3, 2), "overlap"),
        ('Conv<auto_pad = "SAME_UPPER">(x, w)', (1, 2, 4), (3, 2, 3), "auto_pad"),
        ("MatMul(x, w)", (1, 2, 4), (1, 4, 3), "no matrix"),
    ],
)
def test_other_products_are_refused_with_the_reason(
    body: str, x: tuple[int, ...], w: tuple[int, ...], why: str
) -> None:
    weight: Any = np.zeros(w, np.float32)
    assert why in reason_against(node_of(body, x, weight)[0], weight)
