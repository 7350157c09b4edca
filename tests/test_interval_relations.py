"""Operands that depend on each other narrow their results; look-alikes do not."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model
from onnx_intq.interval_arithmetic import Interval
from onnx_intq.intervals import bounds
from onnx_intq.runtime import Session

HEAD = """g (uint8[n, 3] u, int8[n, 3] s, int8[n, 1] one, int64[n, 3] wide) => (int32[n, m] z)
    <int32 three = {3}, int32 less = {-3}, int32 also = {3}, int32[3] several = {1, 7, -9},
     int64[1] last = {-1}, int64[1] first = {0}, int32 zero = {0}, int32 fifty = {50},
     int64 far = {1000000000}> {
        x = Cast<to = 6>(u)
        y = Cast<to = 6>(s)"""


def intervals(lines: str, head: str = HEAD) -> dict[str, Interval]:
    text = f'<ir_version: 8, opset_import: ["" : 18]>{head} {lines} z = Identity(zero) }}'
    return bounds(graph_from_model(onnx.parser.parse_model(text))).intervals


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("m = ReduceMax(x, last) t = Sub(m, x)", (0, 255)),
        ("m = ReduceMax(y, first) t = Sub(m, y)", (0, 255)),
        ("m = ReduceMax(y) t = Sub(m, y)", (0, 255)),
        ("m = ReduceMax<keepdims = 0>(x, last) t = Sub(m, x)", (-255, 255)),
        ("m = ReduceMax(x, last) t = Sub(x, m)", (-255, 255)),
        ("m = ReduceMax(x, last) t = Sub(m, y)", (-127, 383)),
        ("m = ReduceMin(x, last) t = Sub(m, x)", (-255, 255)),
        ("q = Div(x, three) p = Mul(q, three) t = Sub(x, p)", (0, 2)),
        ("q = Div(x, three) p = Mul(three, q) t = Sub(x, p)", (0, 2)),
        ("q = Div(y, three) p = Mul(q, three) t = Sub(y, p)", (-2, 2)),
        ("q = Div(x, three) p = Mul(q, three) t = Sub(p, x)", (-2, 0)),
        ("q = Div(y, less) p = Mul(q, less) t = Sub(y, p)", (-2, 2)),
        ("n = Min(y, zero) q = Div(n, less) p = Mul(q, less) t = Sub(n, p)", (-2, 0)),
        ("q = Div(x, several) p = Mul(q, several) t = Sub(x, p)", (0, 8)),
        ("q = Div(x, three) p = Mul(q, also) t = Sub(x, p)", (-255, 255)),
        ("q = Div(y, three) p = Mul(q, three) t = Sub(x, p)", (-126, 381)),
        ("p = Mul(x, three) t = Sub(x, p)", (-765, 255)),
        ("c = Less(y, zero) t = Where(c, zero, y)", (0, 127)),
        ("c = LessOrEqual(zero, y) t = Where(c, y, zero)", (0, 127)),
        ("c = Greater(y, fifty) t = Where(c, fifty, y)", (-128, 50)),
        ("c = GreaterOrEqual(fifty, y) t = Where(c, y, fifty)", (-128, 50)),
        ("c = Greater(y, fifty) t = Where(c, y, fifty)", (50, 127)),
        ("c = Greater(y, fifty) t = Where(c, y, zero)", (-128, 127)),
        ("c = Equal(y, fifty) t = Where(c, y, fifty)", (-128, 127)),
        ("c = Cast<to = 9>(u) t = Where(c, fifty, y)", (-128, 127)),
        ("c = Less(y, several) t = Where(c, several, y)", (-9, 127)),
    ],
)
def test_dependent_operands_narrow_a_result(lines: str, expected: Interval) -> None:
    assert intervals(lines)["t"] == expected


def test_maxima_that_onnxruntime_may_take_wrongly_tell_nothing() -> None:
    wrong = intervals("w = Cast<to = 7>(wide) m = ReduceMax(w, last) t = Sub(m, w)")
    assert wrong["t"] == (-(1 << 63), (1 << 63) - 1)
    far = intervals("w = Cast<to = 7>(u) f = Mul(w, far) m = ReduceMax(f, last) t = Sub(m, f)")
    assert far["t"] == wrong["t"]
    assert intervals("w = Cast<to = 7>(u) m = ReduceMax(w, last) t = Sub(m, w)")["t"] == (0, 255)


STEP = """g (int8[n, 1] v, int8[n, 2] other, float[n, 1] real, int32 some) => (int32[n, m] z)
    <int32[2] edges = {-5, 20}, int32[1, 2] flat = {20, -5}, int32[2, 1] tall = {-5, 20},
     int32[1, 1, 2] deep = {-5, 20}, float[2] points = {-5, 20}, float[1] endless = {inf},
     int64[2] long = {-5, 20}, uint8[2] few = {5, 20},
     int32[3] table = {2, 10, 5}, int32[4] more = {2, 10, 5, 3}, int32[2] fewer = {2, 10},
     int32[1, 3] row = {2, 10, 5}, uint8[3] bytes = {2, 10, 5}, int64[1] last = {-1},
     int64[1] second = {1}, int64[2] both = {0, 1}, int64[1] first = {0}, int32 one = {1},
     int32 zero = {0}, int32[1] listed = {1}> {
        wide = Cast<to = 7>(v)
        x = Cast<to = 6>(wide)
        two = Cast<to = 6>(other)
        byte = Cast<to = 2>(x)
        wider = Cast<to = 7>(x)
        """
LINES = """c = GreaterOrEqual(x, edges)
        w = Where(c, one, zero)
        k = ReduceSum(w, last)
        d = Gather(table, k)
        t = Div(x, d)"""
KNOWN = (-64, 25)
"""Of -128..-6 / 2, -5..19 / 10 and 20..127 / 5: -64..-3, 0..1, 4..25."""
UNKNOWN = (-64, 63)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("edges", "edges", KNOWN),
        ("edges", "flat", KNOWN),
        ("last", "second", KNOWN),
        ("table", "more", KNOWN),
        ("x, edges", "wide, long", KNOWN),
        ("x, edges", "wider, long", KNOWN),
        ("x, edges", "byte, few", UNKNOWN),
        ("x, edges", "edges, x", UNKNOWN),
        ("x, edges", "real, points", UNKNOWN),
        ("x, edges", "two, edges", UNKNOWN),
        ("x, edges", "x, some", UNKNOWN),
        ("x, edges", "real, endless", UNKNOWN),
        ("(x, ", "(two, ", UNKNOWN),
        ("edges", "tall", UNKNOWN),
        ("edges", "deep", UNKNOWN),
        ("GreaterOrEqual", "Greater", UNKNOWN),
        ("one, zero", "zero, one", UNKNOWN),
        ("one, zero", "one, one", UNKNOWN),
        ("one, zero", "listed, zero", UNKNOWN),
        ("one, zero", "some, zero", UNKNOWN),
        ("one, zero", "one, some", UNKNOWN),
        ("(w, last)", "(w)", UNKNOWN),
        ("(w, last)", "<keepdims = 0>(w, last)", UNKNOWN),
        ("last", "both", UNKNOWN),
        ("last", "first", UNKNOWN),
        ("table", "fewer", UNKNOWN),
        ("table", "row", UNKNOWN),
        ("Div(x", "Div(two", UNKNOWN),
        ("d = Gather(table, k)", "one_more = Add(k, one) d = Gather(more, one_more)", (-64, 63)),
        ("Gather(table, k)\n        t = Div(x, d)", "Gather(bytes, k) t = Div(byte, d)", (0, 127)),
    ],
)
def test_a_quotient_by_a_step_function_is_bounded_step_by_step(
    old: str, new: str, expected: Interval
) -> None:
    assert old in LINES
    assert intervals(LINES.replace(old, new), STEP)["t"] == expected


@given(
    ends=st.tuples(*[st.integers(-128, 127)] * 2).map(sorted),
    edges=st.lists(st.integers(-140, 140), min_size=1, max_size=4),
    table=st.lists(st.integers(1, 40), min_size=5, max_size=5),
)
def test_its_bounds_are_reached(ends: list[int], edges: list[int], table: list[int]) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 18]> g (int8[n, 1] v) => (int32[n, 1] t)
        <int32[{len(edges)}] edges = {{{str(edges)[1:-1]}}}, int32 one = {{1}}, int32 zero = {{0}},
         int32[5] table = {{{str(table)[1:-1]}}}, int64[1] last = {{-1}}, int32 low = {{{ends[0]}}},
         int32 high = {{{ends[1]}}}> {{
            free = Cast<to = 6>(v)
            x = Clip(free, low, high)
            {LINES} }}"""
    proto = onnx.parser.parse_model(text)
    every = np.arange(-128, 128, dtype=np.int8)[:, None]
    quotients = Session(proto, threads=1, optimize=False).run({"v": every})["t"]
    found = bounds(graph_from_model(proto)).intervals["t"]
    assert found == (quotients.min(), quotients.max())
