"""Bounds within the bodies of Scan, and of what comes out of them."""

from typing import Any

import numpy as np
import onnx.parser
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.intervals import Bounds, bounds
from onnx_intq.runtime import Session
from onnx_intq.tensor_types import forget_types

law = settings(max_examples=40, deadline=None)
CUT = "a = Cast<to = 6>(s) t = Sub(now, a) v = Clip(t, low, high) out = Cast<to = 3>(v)"
"""The next state of s, an int8 one."""


def model(body: str, state: str = "int32") -> Any:
    """The state s and the slices of u, 0 to 9 as int32, make the next state and y."""
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (int32[t, 2] x, {state}[2] start) => ({state}[2] last, int32[t, 2] ys)
        <int32 zero = {{0}}, int32 nine = {{9}}, int32 low = {{-100}}, int32 high = {{100}},
         int32 far = {{1073741824}}, int8[2] fixed = {{3, 100}}> {{
            u = Clip(x, zero, nine)
            last, ys = Scan<num_scan_inputs = 1, body =
                b ({state}[2] s, int32[2] now) => ({state}[2] out, int32[2] y) {{ {body} }}>
                (start, u)
        }}"""
    )


def found(proto: Any) -> Bounds:
    """What is found; the same where the file's types are not believed."""
    have = bounds(graph_from_model(proto))
    forget_types(proto.graph)
    forgotten = bounds(graph_from_model(proto))
    assert [r.why for r in forgotten.risks] == [r.why for r in have.risks]
    assert forgotten.intervals == have.intervals
    return have


def test_what_is_scanned_keeps_its_bounds() -> None:
    have = found(model("out = Identity(now) y = Mul(now, now)"))
    assert have.risks == ()
    assert have.intervals["ys"] == (0, 81)


def test_a_state_holds_what_its_type_holds() -> None:
    """So its sum with anything may leave int32, and what is cut to a range may not."""
    (risk,) = found(model("out = Add(s, now) y = Identity(now)")).risks
    assert risk.why == "Add: -2147483648..2147483656 may leave int32"
    have = found(model(f"{CUT} y = Identity(t)", "int8"))
    assert have.risks == ()
    assert have.intervals["ys"] == (-127, 137)


def test_the_last_state_is_the_bodys_or_the_first() -> None:
    """After no step, it is the one to begin with."""
    body = "a = Cast<to = 6>(s) v = Clip(a, zero, nine) out = Cast<to = 3>(v) y = Identity(now)"
    proto = model(body, "int8")
    assert found(proto).intervals["last"] == (-128, 127)
    proto.graph.node[1].input[0] = "fixed"
    assert found(proto).intervals["last"] == (0, 100)


@law
@given(seed=st.integers(0, 9), steps=st.integers(1, 6))
def test_nothing_is_outside(seed: int, steps: int) -> None:
    net = graph_from_model(model(f"{CUT} y = Mul(t, t)", "int8"))
    random = np.random.default_rng(seed)
    x = random.integers(-99, 99, (steps, 2)).astype(np.int32)
    start = random.integers(-128, 128, 2).astype(np.int8)
    results = Session(model_from_graph(net)).run({"x": x, "start": start})
    limits = bounds(net).intervals
    for name, values in results.items():
        low, high = limits[name]
        assert low <= values.min()
        assert values.max() <= high


def test_risks_within_a_body_are_found() -> None:
    (risk,) = found(model("out = Identity(s) y = Mul(now, far)")).risks
    assert risk.why == "Mul: 0..9663676416 may leave int32"


def test_float_tensors_have_no_bounds() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[t, 2] x, int8[2] start) => (int8 last, float ys) {
            last, ys = Scan<num_scan_inputs = 1, body = b (int8[2] s, float[2] now)
                => (int8[2] out, float[2] y) { out = Identity(s) y = Abs(now) }>(start, x)
        }"""
    )
    have = bounds(graph_from_model(proto))
    assert have.risks == ()
    assert set(have.intervals) == {"start", "last"}
