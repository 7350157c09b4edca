"""Scan in the interpreter: states carried, slices taken and put together as onnxruntime does."""

from typing import Any

import numpy as np
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model
from onnx_intq.interpreter import Interpreter, differences
from onnx_intq.transform import IntqError

law = settings(max_examples=40, deadline=None)
INTEGERS = {"x": np.int32, "u": np.int32, "s": np.int32, "k": np.int32}


def graph(axes: tuple[int, int], backwards: tuple[int, int], out: int, back: int) -> Any:
    """s' = s + x + k, whose y = s' * u is collected: x and u are scanned, k is an outer tensor."""
    shapes = ["2, 3"] * 2
    dims = [
        ", ".join(
            ("t", *shape.split(", "))
            if axis == 0
            else ("2", "t", "3")
            if axis == 1
            else ("2", "3", "t")
        )
        for axis, shape in zip(axes, shapes, strict=True)
    ]
    return graph_from_model(
        onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["" : 21]>
            g (int32[{dims[0]}] x, int32[{dims[1]}] u, int32[2, 3] s, int32[3] k)
            => (int32 last, int32 ys) {{
                last, ys = Scan<num_scan_inputs = 2, scan_input_axes = {list(axes)},
                    scan_input_directions = {list(backwards)}, scan_output_axes = [{out}],
                    scan_output_directions = [{back}], body =
                    b (int32[2, 3] state, int32[2, 3] now, int32[2, 3] factor)
                    => (int32[2, 3] new, int32[2, 3] y) {{
                        sum = Add(state, now)
                        new = Add(sum, k)
                        y = Mul(new, factor)
                    }}>(s, x, u)
            }}"""
        )
    )


def feeds(axes: tuple[int, int], steps: int, second: int | None = None) -> dict[str, Any]:
    random = np.random.default_rng(0)
    found = {"s": random.integers(-9, 9, (2, 3)), "k": random.integers(-9, 9, 3)}
    for name, axis, count in zip("xu", axes, (steps, second or steps), strict=True):
        shape = [2, 3]
        shape.insert(axis, count)
        found[name] = random.integers(-9, 9, shape)
    return {name: values.astype(np.int32) for name, values in found.items()}


@law
@given(
    axes=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    backwards=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    out=st.integers(0, 2),
    back=st.integers(0, 1),
    steps=st.integers(1, 5),
)
def test_it_is_onnxruntimes(
    axes: tuple[int, int], backwards: tuple[int, int], out: int, back: int, steps: int
) -> None:
    model = graph(axes, backwards, out, back)
    for value in model.outputs:
        value.shape = None
    assert differences(model, feeds(axes, steps)) == []


def test_states_are_carried() -> None:
    given_ = feeds((0, 0), 3)
    found = Interpreter(graph((0, 0), (0, 0), 0, 0)).run(given_)
    states = given_["s"] + np.cumsum(given_["x"] + given_["k"], axis=0)
    assert np.array_equal(found["last"], states[-1])
    assert np.array_equal(found["ys"], states * given_["u"])


def test_inputs_of_different_length() -> None:
    with pytest.raises(IntqError, match=r"\(Scan\) failed .*: a Scan over 3 and 2 steps"):
        Interpreter(graph((0, 0), (0, 0), 0, 0)).run(feeds((0, 0), 3, second=2))


def test_no_step() -> None:
    empty = feeds((0, 0), 1)
    empty |= {name: empty[name][:0] for name in "xu"}
    with pytest.raises(IntqError, match="a Scan over 0 and 0 steps"):
        Interpreter(graph((0, 0), (0, 0), 0, 0)).run(empty)


def test_plain_attributes_are_the_defaults() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (int8[t, 2] x) => (int8[t, 2] y) {
        y = Scan<num_scan_inputs = 1, body = b (int8[2] i) => (int8[2] o) { o = Add(i, i) }>(x) }"""
    model = graph_from_model(onnx.parser.parse_model(text))
    x = np.arange(6, dtype=np.int8).reshape(3, 2)
    assert np.array_equal(Interpreter(model).run({"x": x})["y"], 2 * x)
    assert differences(model, {"x": x}) == []
