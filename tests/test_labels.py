"""Labels follow the values that they stand for: what a factor reaches is what has its label."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.labels import (
    FIXED,
    CannotScaleError,
    Labels,
    align,
    labels_after,
    labels_before,
    operand_labels,
    shape_of,
    vector,
)
from onnx_intq.runtime import Session

MOVES = [
    ("2, 6, 4", "2, 4, 6", "y = Transpose<perm = [0, 2, 1]>(x)"),
    ("2, 6, 4", "4, 6, 2", "y = Transpose(x)"),
    ("2, 3, 6", "2, 3, 2, 3", "y = Reshape(x, parts)"),
    ("2, 3, 2, 3", "2, 3, 6", "y = Reshape(x, joined)"),
    ("2, 6, 3", "2, 6, 3, 1", "y = Unsqueeze(x, last)"),
    ("2, 6, 3", "2, 6, 3", "y = Relu(x)"),
    ("2, 6, 3", "2, 6, 5", "y = Pad(x, around)"),
    ("2, 6, 5", "2, 6, 3", "y = MaxPool<kernel_shape = [3]>(x)"),
]
SPLIT = ("2, 6, 3", "2, 4, 3", "z, y = Split<axis = 1>(x, sizes)")
CONSTANTS = """int64[4] parts = {0, 0, 2, 3}, int64[3] joined = {2, 3, 6}, int64[1] last = {-1},
    int64[6] around = {0, 0, 1, 0, 0, 1}, int64[6] channels = {0, 1, 0, 0, 1, 0},
    int64[2] sizes = {2, 4}, float one = {1}, int64[3] divided = {4, 3, 3}"""


def moving(shape: str, result: str, body: str) -> tuple[gs.Graph, gs.Node, gs.Tensor]:
    """A graph x -> y of one operator."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[{shape}] x) => (float[{result}] y)
        <{CONSTANTS}> {{ {body} }}"""
    )
    model = graph_from_model(onnx.shape_inference.infer_shapes(proto))
    return model, model.nodes[0], model.outputs[0]


def scaled(values: Any, labels: Labels, factors: Any) -> Any:
    """The values, each by the factor of its label."""
    return values * np.where(labels == FIXED, 1, factors[labels]).astype(np.float32)


def random(shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("move", [*MOVES, SPLIT])
@given(data=st.data())
def test_what_is_scaled_before_is_scaled_after(move: tuple[str, str, str], data: Any) -> None:
    model, node, y = moving(*move)
    x = random(shape_of(model.inputs[0]))
    size = x.shape[-1 if node.op in {"Reshape", "Transpose"} else 1]
    # Parts that look alike lose an axis of their labels, and with it their way back.
    channels = data.draw(
        st.permutations(range(FIXED, 5))
        if node.op == "Reshape"
        else st.lists(st.integers(FIXED, 4), min_size=size, max_size=size)
    )
    labels: Labels
    if x.ndim == 4:  # of heads, all channels
        labels = np.arange(6).reshape(1, 1, 2, 3)
    elif node.op in {"Reshape", "Transpose"}:
        labels = np.asarray(channels).reshape(1, 1, size)
    else:
        labels = np.asarray(channels).reshape(1, size, 1)
    factors = np.asarray([0.5, 2, 4, 8, 16, 0.25])
    session = Session(model_from_graph(model), threads=1)
    before = session.run({"x": scaled(x, labels, factors)})["y"]
    after = labels_after(node, y, labels)
    np.testing.assert_array_equal(
        before, scaled(session.run({"x": x})["y"], np.asarray(after), factors)
    )
    again = labels_after(node, y, labels_before(node, y, after))
    assert (again == after).all()


def test_the_other_parts_of_a_split_keep_their_scale() -> None:
    _, node, y = moving(*SPLIT)
    found = labels_before(node, y, np.arange(4).reshape(1, 4, 1))
    assert found.ravel().tolist() == [FIXED, FIXED, 0, 1, 2, 3]
    for labels in (np.zeros((1, 1, 1), int), np.arange(3).reshape(1, 1, 3)):
        assert labels_after(node, y, labels) is labels
        assert labels_before(node, y, labels) is labels


@pytest.mark.parametrize(
    ("move", "axis", "why"),
    [
        (("2, 6, 3", "2, 6, 3", "y = Sigmoid(x)"), 1, r"\(Sigmoid\) cannot pass on"),
        (("2, 6, 3", "2, 8, 3", "y = Pad(x, channels)"), 1, r"\(Pad\) cannot pass on"),
        (("2, 6, 3", "2, 6, 5", "y = Pad(x, around, one)"), 1, r"\(Pad\) cannot pass on"),
        (("2, 6, 3", "2, 6, 5", 'y = Pad<mode = "edge">(x, around)'), 1, r"\(Pad\) cannot pass"),
        (("2, 6, 5", "2, 6, 3", "y = MaxPool<kernel_shape = [3]>(x)"), 2, r"\(MaxPool\) cannot"),
        (("2, 6, 3", "4, 3, 3", "y = Reshape(x, divided)"), 1, "a reshape that divides channels"),
        (("2, 6, t", "a, b, c", "y = Reshape(x, joined)"), 1, "sizes are not known"),
    ],
)
def test_what_mixes_channels_stands_in_the_way(
    move: tuple[str, str, str], axis: int, why: str
) -> None:
    model, node, y = moving(*move)
    shape = [size if i == axis else 1 for i, size in enumerate(shape_of(model.inputs[0]))]
    labels = np.arange(shape[axis]).reshape(shape)
    with pytest.raises(CannotScaleError, match=why):
        labels_after(node, y, labels)


def test_an_unknown_shape_stands_in_the_way() -> None:
    with pytest.raises(CannotScaleError, match="the shape of x is not known"):
        shape_of(gs.Variable("x"))


def test_channels_lie_along_one_axis() -> None:
    node = gs.Node("Conv", "c")
    assert vector(np.arange(4).reshape(1, 4, 1), -2, node).tolist() == [0, 1, 2, 3]
    for labels, axis in ((np.arange(4).reshape(1, 4), 0), (np.zeros((1, 1), int), 1)):
        with pytest.raises(CannotScaleError, match="c has its channels elsewhere"):
            vector(labels, axis, node)


def test_labels_broadcast_as_values_do() -> None:
    labels = np.arange(4).reshape(4, 1)
    assert align(labels, 3).shape == (1, 4, 1)
    with pytest.raises(CannotScaleError, match="a result of fewer axes"):
        align(labels, 1)
    assert operand_labels(labels, (2, 4, "t")).shape == (1, 4, 1)
    assert operand_labels(labels.reshape(1, 4, 1), (4, "t")).shape == (4, 1)
    for shape in ((1, 5), ("t",), (2, "t", 5)):
        with pytest.raises(CannotScaleError, match="an operand is broadcast along the channels"):
            operand_labels(labels, shape)
