from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import Names, graph_from_model, model_from_graph
from onnx_intq.lowering import CannotLowerError
from onnx_intq.pooling import Window, taps, window
from onnx_intq.runtime import Session
from onnx_intq.value import Builder

law = settings(max_examples=60, deadline=None)
AXES = st.lists(
    st.tuples(*(st.integers(1, high) for high in (3, 3, 2)), st.integers(0, 2), st.integers(0, 2)),
    min_size=1,
    max_size=3,
)


def made(axes: list[Any]) -> Window:
    kernel, strides, dilations, begin, end = (tuple(v) for v in zip(*axes, strict=True))
    return Window(kernel=kernel, strides=strides, dilations=dilations, begin=begin, end=end)


def node(attrs: str, dims: str = "1, 2, t") -> gs.Node:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[{dims}] x) => (float[1, 2, u] y) {{
            y = MaxPool<{attrs}>(x)
        }}"""
    )
    return graph_from_model(model).nodes[0]


def gathered(x: Any, where: Window, fill: int) -> Any:
    """Taps in NumPy, the first axis one per place."""
    pads = [(0, 0), (0, 0), *zip(where.begin, where.end, strict=True)]
    x = np.pad(x, pads, constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(x, where.spans, tuple(range(2, x.ndim)))
    steps = [slice(None, None, s) for s in where.strides]
    places = [slice(None, None, d) for d in where.dilations]
    view = view[(slice(None), slice(None), *steps, *places)]
    rank = len(where.kernel)
    return view.reshape(*view.shape[: 2 + rank], -1).transpose(-1, *range(2 + rank))


@law
@given(AXES, st.sampled_from(["int8", "uint16", "int32"]))
def test_taps_are_the_places_of_all_windows(axes: list[Any], dtype: str) -> None:
    where, sizes = made(axes), [7, 8, 9][: len(axes)]
    tensor = gs.Variable("x", np.dtype(dtype), [1, 2, *"hwd"[: len(axes)]])
    model = gs.Graph(inputs=[tensor], opset=21, name="g")
    builder = Builder(model, Names(model), {})
    slices = taps(builder.value(tensor, 0, 100), where, 7, None)
    names = [f"y{i}" for i in range(len(slices))]
    model.outputs = [gs.Variable(name, np.int32) for name in names]
    for value, output in zip(slices, model.outputs, strict=True):
        model.nodes.append(gs.Node("Identity", output.name, {}, [value.tensor], [output]))
    x = np.random.default_rng(0).integers(0, 100, (1, 2, *sizes)).astype(dtype)
    found = Session(model_from_graph(model)).run({"x": x})
    np.testing.assert_array_equal(np.stack([found[n] for n in names]), gathered(x, where, 7))
    assert {(value.low, value.high) for value in slices} == {(0, 100)}


@law
@given(AXES)
def test_counts_leave_padding_out(axes: list[Any]) -> None:
    where, sizes = made(axes), [7, 8, 9][: len(axes)]
    ones = np.ones((1, 1, *sizes), np.int64)
    np.testing.assert_array_equal(where.counts(sizes), gathered(ones, where, 0).sum(axis=0)[0, 0])


def test_attributes_that_are_left_out_are_ones_and_zeros() -> None:
    found = window(node("kernel_shape = [3]"))
    assert found == Window(kernel=(3,), strides=(1,), dilations=(1,), begin=(0,), end=(0,))
    assert not found.padded
    assert window(node("kernel_shape = [3], pads = [0, 1]")).padded


PADDED = [
    ("SAME_UPPER", "1, 2, t", 1, (1,), (2,)),
    ("SAME_LOWER", "1, 2, t", 1, (2,), (1,)),
    ("SAME_UPPER", "1, 2, 7", 2, (1,), (2,)),
    ("SAME_UPPER", "1, 2, 8", 2, (1,), (1,)),
    ("VALID", "1, 2, t", 3, (0,), (0,)),
]


@pytest.mark.parametrize(("mode", "dims", "stride", "begin", "end"), PADDED)
def test_auto_pad(mode: str, dims: str, stride: int, begin: Any, end: Any) -> None:
    text = f'kernel_shape = [4], strides = [{stride}], auto_pad = "{mode}"'
    found = window(node(text, dims))
    assert (found.begin, found.end) == (begin, end)


REFUSED = [
    ("ceil_mode = 1", "1, 2, t", "rounds the size"),
    ('strides = [2], auto_pad = "SAME_UPPER"', "1, 2, t", "a length that is not fixed"),
    ('dilations = [2], auto_pad = "SAME_UPPER"', "1, 2, t", "pads as if dense"),
    ('strides = [6], auto_pad = "SAME_UPPER"', "1, 2, 12", "leave elements out"),
]


@pytest.mark.parametrize(("attrs", "dims", "why"), REFUSED)
def test_refuses_with_the_reason(attrs: str, dims: str, why: str) -> None:
    with pytest.raises(CannotLowerError, match=why):
        window(node(f"kernel_shape = [4], {attrs}", dims))


def test_an_unknown_rank_is_a_length_that_is_not_fixed() -> None:
    found = node('kernel_shape = [4], strides = [2], auto_pad = "SAME_UPPER"')
    found.inputs[0].shape = None
    with pytest.raises(CannotLowerError, match="a length that is not fixed"):
        window(found)
