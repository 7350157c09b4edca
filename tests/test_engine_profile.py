import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.engine_profile import Profile, check, profiles, read_shapes, text, with_batch
from onnx_intq.frontend import Frontend
from onnx_intq.graph import metadata
from onnx_intq.speech import FRONTEND_KEY
from onnx_intq.transform import IntqError

AXES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def speech(stride: float | None = None, *, named: bool = True) -> gs.Graph:
    names: list[int | str | None] = ["batch", 64, "time"] if named else [None, 64, None]
    inputs = [
        gs.Variable("audio_signal", np.float32, names),
        gs.Variable("length", np.int64, names[:1]),
    ]
    graph = gs.Graph(inputs=inputs)
    if stride is not None:
        metadata(graph)[FRONTEND_KEY] = Frontend(window_stride=stride).to_json()
    return graph


@pytest.mark.parametrize(("stride", "scale"), [(None, 1), (0.01, 1), (0.02, 2)])
@pytest.mark.parametrize("named", [True, False])
def test_defaults_are_2_to_20_seconds_of_the_recorded_front_end(
    stride: float | None, scale: int, named: bool
) -> None:
    sizes = [(1, 64, 200 // scale), (1, 64, 1000 // scale), (8, 64, 2000 // scale)]
    found = profiles(speech(stride, named=named), {})
    assert found == {"audio_signal": tuple(sizes), "length": ((1,), (1,), (8,))}


def test_axes_of_one_name_follow_what_is_given() -> None:
    shapes: Profile = ((2, 64, 50), (3, 64, 60), (4, 64, 70))
    found = profiles(speech(), {"audio_signal": shapes})
    assert found == {"audio_signal": shapes, "length": ((2,), (3,), (4,))}


def test_static_inputs_have_one_shape() -> None:
    inputs = [gs.Variable("x", np.float32, [2, 3]), gs.Variable("s", np.float32, [])]
    assert profiles(gs.Graph(inputs=inputs), {}) == {"x": ((2, 3),) * 3, "s": ((),) * 3}


def test_shapes_for_no_input_are_refused() -> None:
    with pytest.raises(IntqError, match=r"given for 'audio'; expected .*: audio_signal, length$"):
        profiles(speech(), {"audio": ((1,),) * 3})


@given(st.text(min_size=1), AXES, st.booleans())
def test_shapes_are_read_back(name: str, sizes: list[int], grow: bool) -> None:
    small = tuple(sizes)
    shapes = (small, small, tuple(2 * s for s in sizes)) if grow else (small,)
    expected = shapes if grow else shapes * 3
    assert read_shapes([f"{name}={text(shapes)}"]) == {name: expected}


@pytest.mark.parametrize(
    "given_text",
    ["", "x", "x=", "=1x2", "x=1x2:1x3", "x=1x2:1x3:1x4:1x5", "x=1x-2", "x=1,2", "x=1x2:", "x=²"],
)
def test_other_texts_are_refused(given_text: str) -> None:
    with pytest.raises(IntqError, match="; expected INPUT=SHAPE or INPUT=SMALLEST:COMMON:LARGEST"):
        read_shapes([given_text])


def test_an_input_is_given_once() -> None:
    with pytest.raises(IntqError, match="names 'x' twice"):
        read_shapes(["x=1", "y=1", "x=2"])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4), (2, 4), (3, 4, 5)), "do not fit"),
        (((1, 4), (2, 5), (3, 4)), "do not fit"),
        (((0, 4), (2, 4), (3, 4)), "do not fit"),
        (((3, 4), (2, 4), (3, 4)), "shrink"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: Profile, message: str) -> None:
    with pytest.raises(IntqError, match=f"of input 'x' {message}; expected .* fit"):
        check("x", (-1, 4), shapes)


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 9), min_size=3, max_size=3))))
def test_shapes_that_fit_are_taken(axes: list[tuple[bool, list[int]]]) -> None:
    sizes = [sorted(s) if dynamic else s[:1] * 3 for dynamic, s in axes]
    declared = [-1 if dynamic else s[0] for dynamic, s in axes]
    small, common, large = (tuple(s[which] for s in sizes) for which in range(3))
    check("x", declared, (small, common, large))


def test_the_batch_is_set_where_it_is_open() -> None:
    graph = speech()
    graph.inputs.append(gs.Variable("fixed", np.float32, [1, 2]))
    shapes = {"audio_signal": (1, 64, 5), "length": (1,), "fixed": (1, 2)}
    found = {"audio_signal": (4, 64, 5), "length": (4,), "fixed": (1, 2)}
    assert with_batch(graph, shapes, 4) == found
