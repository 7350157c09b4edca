"""Shapes behind computed bounds are those that tensors have when the model runs."""

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model
from onnx_intq.shape_arithmetic import LARGEST, infer_shapes, static_shapes
from onnx_intq.shapes import infer
from onnx_intq.torch_graph import TorchGraph

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def model(signature: str, body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{HEADER} g {signature} {{ {body} }}")


RELATIVE = model(
    "(float[b, n, 4] x) => (float[b, n, m] y) <float[1, 4, 20] table, int64[1] one = {1}, "
    "int64[1] two = {2}, int64[1] axis = {2}, int64[1] longest = {20}, int64[1] end = {999}, "
    "int64[1] zero = {0}, int64[1] rest = {-1}>",
    """
    shape = Shape(x) frames = Slice(shape, one, two) begin = Sub(longest, frames)
    part = Slice(table, begin, longest, axis) scores = MatMul(x, part)
    cut = Slice(scores, zero, frames, two)
    sizes = Concat<axis = 0>(zero, frames, rest) y = Reshape(cut, sizes)
    """,
)
"""Bounds of slices and a shape that depend on the number of frames."""


@given(batch=st.integers(1, 3), frames=st.integers(1, 9))
def test_are_those_of_a_run(batch: int, frames: int) -> None:
    filled = onnx.ModelProto()
    filled.CopyFrom(RELATIVE)
    values = np.ones((1, 4, 20), np.float32)
    filled.graph.initializer.append(onnx.numpy_helper.from_array(values, "table"))
    graph = graph_from_model(filled)
    names = [t.name for node in graph.nodes for t in node.outputs]
    run = TorchGraph(graph, taps=names)({"x": torch.ones(batch, frames, 4)})
    found = infer(graph, {"x": (batch, frames, 4)})
    assert {name: found[name] for name in names} == {n: tuple(run[n].shape) for n in names}


def inferred(body: str, extra: str = "") -> onnx.ModelProto:
    """Of x, float [2, 3], to y."""
    given = model(f"(float[2, 3] x{extra}) => (float[1] y)", body)
    given.graph.output[0].ClearField("type")
    return infer_shapes(given)


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("s = Shape<start = 1>(x) y = ConstantOfShape(s)", (3,)),
        ("s = Shape<start = -1, end = 9>(x) y = ConstantOfShape(s)", (3,)),
        (
            "s = Shape(x) f = Cast<to = 1>(s) h = Floor(f) i = Cast<to = 7>(h) y = Expand(x, i)",
            (2, 3),
        ),
        ("s = Shape(x) a, b = Split<axis = 0>(s) y = Tile(x, s)", (4, 9)),
        ("n = NonZero(x) y = Shape(n)", (2,)),
    ],
)
def test_is_known(body: str, shape: tuple[int, ...]) -> None:
    assert static_shapes(inferred(body))["y"] == shape


@pytest.mark.parametrize(
    "body",
    [
        "n = NonZero(x) y = Neg(n)",  # depends on the values
        "s = Shape(k) y = ConstantOfShape(s)",  # of an input of unknown shape
        "q = RandomUniform<shape = [2]>() i = Cast<to = 7>(q) y = ConstantOfShape(i)",
    ],
)
def test_is_left_open(body: str) -> None:
    assert "y" not in static_shapes(inferred(body, ", float[n] k"))


def test_large_tensors_are_not_computed() -> None:
    sizes = f"<int64[1] s = {{{LARGEST + 1}}}>"
    given = model(f"(float[1] x) => (float[n] y) {sizes}", "e = ConstantOfShape(s) y = Add(x, e)")
    found = infer_shapes(given)
    assert [node.op_type for node in found.graph.node] == ["ConstantOfShape", "Add"]
    assert static_shapes(found)["e"] == (LARGEST + 1,)


def test_what_the_evaluator_cannot_compute_stays() -> None:
    given = model("(int64[1] x) => (int64[1] y)", "i = Cast<to = 7>(text) y = Add(i, x)")
    text = onnx.numpy_helper.from_array(np.array(["no number"], object), "text")
    given.graph.initializer.append(text)
    assert [node.op_type for node in infer_shapes(given).graph.node] == ["Cast", "Add"]
