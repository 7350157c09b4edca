from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.frontend import Frontend
from onnx_intq.graph import graph_from_model, metadata, model_from_graph
from onnx_intq.shapes import infer, input_shapes
from onnx_intq.speech import FRONTEND_KEY
from onnx_intq.transform import IntqError

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def graph(signature: str, body: str = "y = Relu(x)") -> gs.Graph:
    return graph_from_model(onnx.parser.parse_model(f"{HEADER} g {signature} {{ {body} }}"))


SPEECH = graph("(float[b, 64, t] x, int64[b] length, float[b, t] mask) => (float[b, 64, t] y)")


def test_the_last_dynamic_axis_is_time_and_axes_of_one_name_are_equally_long() -> None:
    assert input_shapes(SPEECH, seconds=10) == {
        "x": (1, 64, 1000),
        "length": (1,),
        "mask": (1, 1000),
    }


def test_frames_follow_from_the_recorded_front_end() -> None:
    model = SPEECH.copy()
    metadata(model)[FRONTEND_KEY] = Frontend(window_stride=0.02).to_json()
    assert input_shapes(model, seconds=10)["x"] == (1, 64, 500)


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("(float[b, t, 80] x) => (float[b, t, 80] y)", (1, 200, 80)),
        ("(float[b, 3, 8] x) => (float[b, 3, 8] y)", (1, 3, 8)),
        ("(float[2, 3] x) => (float[2, 3] y)", (2, 3)),
    ],
)
def test_other_layouts(signature: str, expected: tuple[int, ...]) -> None:
    assert input_shapes(graph(signature), seconds=2)["x"] == expected


def test_given_shapes_decide_and_carry_over_to_axes_of_the_same_name() -> None:
    found = input_shapes(SPEECH, seconds=10, shapes={"x": [2, 64, 7]})
    assert found == {"x": (2, 64, 7), "length": (2,), "mask": (2, 7)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": [1]}, "shape given for 'z', which is no input; expected one of: x, length, mask"),
        ({"x": [1, 64]}, r"shape \[1, 64\] for input 'x'; expected \['b', 64, 't'\]"),
        ({"x": [1, 80, 5]}, r"shape \[1, 80, 5\] for input 'x'"),
        ({"x": [1, 64, 0]}, r"shape \[1, 64, 0\] for input 'x'"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: Mapping[str, Sequence[int]], message: str
) -> None:
    with pytest.raises(IntqError, match=message):
        input_shapes(SPEECH, seconds=10, shapes=shapes)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_audio_has_a_length(seconds: float) -> None:
    with pytest.raises(IntqError, match="seconds of audio; expected more than 0"):
        input_shapes(SPEECH, seconds=seconds)


def test_shapes_are_inferred_through_shape_arithmetic_and_large_weights() -> None:
    text = f"""{HEADER} g (float[b, 64, t] x) => (float[b, c, u] y) <int64[1] all = {{-1}}> {{
        a = Conv<strides: ints = [2]>(x, w)
        size = Shape(a)
        flat = Reshape(a, all)
        y = Reshape(flat, size)
    }}"""
    model = onnx.parser.parse_model(text)
    weights = np.ones((96, 64, 1), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    subject = graph_from_model(model)
    before = model_from_graph(subject).SerializeToString(deterministic=True)
    found = infer(subject, {"x": (2, 64, 9)})
    assert found["a"] == found["y"] == (2, 96, 5)
    assert found["flat"] == (960,)
    assert found["w"] == (96, 64, 1)
    assert model_from_graph(subject).SerializeToString(deterministic=True) == before


def test_shapes_behind_unknown_operators_are_left_out() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "custom" : 1]>
        g (float[b, 4] x) => (float[b, 4] y) { a = custom.Odd(x) y = Relu(a) }"""
    found = infer(graph_from_model(onnx.parser.parse_model(text)), {"x": (3, 4)})
    assert found == {"x": (3, 4)}


def test_inputs_that_contradict_the_graph_are_refused() -> None:
    model = graph(
        "(float[b, t] x, float[c, u] z) => (float[b, v] y)", "y = Concat<axis: int = 1>(x, z)"
    )
    with pytest.raises(IntqError, match=r"shapes x \[2, 3\], z \[4, 5\] do not fit the model"):
        infer(model, {"x": (2, 3), "z": (4, 5)})
