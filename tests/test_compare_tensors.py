import json

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.compare_tensors import Reading, View, counterpart, view
from onnx_intq.graph import graph_from_model, metadata
from onnx_intq.lowering import GRIDS_KEY
from onnx_intq.transform import IntqError

HEADER = '<ir_version: 10, opset_import: ["" : 21]> net '
SCALES = "<float s = {0.5}, uint8 z = {3}, float[2] c = {1, 2}, uint8[2] cz = {0, 0}>"
TYPES = ["int8", "uint8", "int16", "uint16", "int32"]


def graph(text: str, grids: object = None) -> gs.Graph:
    found = graph_from_model(onnx.parser.parse_model(HEADER + text))
    if grids is not None:
        metadata(found)[GRIDS_KEY] = grids if isinstance(grids, str) else json.dumps(grids)
    return found


def held(found: View) -> list[tuple[str, str, float | None]]:
    return [(r.name, r.tensor, r.scale) for r in found.readings]


def integer(dtype: str, scale: float, zero_point: int) -> Reading:
    return Reading(name="t", tensor="q", dtype=np.dtype(dtype), scale=scale, zero_point=zero_point)


REAL = Reading(name="t", tensor="t", dtype=np.dtype(np.float32))


@given(st.sampled_from(TYPES), st.floats(1e-6, 1e3), st.floats(0, 1), st.integers(0, 99))
def test_what_is_stored_means_the_same_within_half_a_step(
    dtype: str, scale: float, place: float, seed: int
) -> None:
    limits = np.iinfo(dtype)
    low, high = max(int(limits.min), -(1 << 20)), min(int(limits.max), 1 << 20)
    reading = integer(dtype, scale, round(low + place * (high - low)))
    first, last = ((end - reading.zero_point) * scale for end in (low, high))
    values = np.random.default_rng(seed).uniform(first, last, 50)
    stored = reading.store(values, REAL)
    assert stored.dtype == dtype
    np.testing.assert_array_less(np.abs(reading.real(stored) - values), scale * 0.5001)


@given(st.sampled_from(TYPES), st.integers(0, 99))
def test_integers_of_one_grid_are_kept(dtype: str, seed: int) -> None:
    limits = np.iinfo(dtype)
    values = np.random.default_rng(seed).integers(limits.min, limits.max, 50, dtype=dtype)
    reading = integer(dtype, 0.1, 5)
    np.testing.assert_array_equal(reading.store(values, reading), values)


def test_signed_and_unsigned_integers_of_one_scale_share_a_grid() -> None:
    signed, unsigned = integer("int8", 0.1, -128), integer("uint8", 0.1 * (1 + 1e-7), 0)
    assert signed.shares_grid(unsigned)
    np.testing.assert_array_equal(
        signed.store(np.array([0, 7, 255], np.uint8), unsigned), np.array([-128, -121, 127])
    )
    assert not signed.shares_grid(integer("uint8", 0.11, 0))
    assert not signed.shares_grid(REAL)
    assert not REAL.shares_grid(REAL)


def test_values_outside_the_grid_are_clipped_and_real_ones_keep_their_type() -> None:
    wide = integer("int16", 0.1, 0)
    narrow = integer("int8", 0.1, 0)
    assert narrow.store(np.array([300, -300], np.int16), wide).tolist() == [127, -128]
    assert REAL.store(np.array([5], np.int8), narrow) == np.float32(0.5)
    flag = Reading(name="f", tensor="f", dtype=np.dtype(np.bool_), scale=1.0)
    assert flag.store(np.array([True, False]), flag).tolist() == [True, False]


def test_a_float_model_is_read_as_it_is() -> None:
    found = view(
        graph(
            "(float[2] x, int64 n) => (float[2] y, int64 m) { a = Relu(x) m = Abs(n) y = Neg(a) }"
        )
    )
    assert found.kind == "float"
    # The length that comes out is compared; inner integers and inputs are not.
    assert held(found) == [("x", "x", None), ("a", "a", None), ("m", "m", 1.0), ("y", "y", None)]


def test_pairs_are_found_whatever_their_tensors_are_called() -> None:
    text = (
        SCALES
        + """{
        xq = QuantizeLinear(x, s, z)   one = DequantizeLinear(xq, s, z)
        a = Neg(one)   r = Relu(a)
        rq = QuantizeLinear(r, s, z)   two = DequantizeLinear(rq, s, z)
        f = Abs(two)
        fq = QuantizeLinear(f, s, z)   y = DequantizeLinear(fq, s, z)
        o = Exp(f)
    }"""
    )
    found = view(graph("(float[2] x) => (float[2] y, float[2] o) " + text))
    assert found.kind == "QDQ"
    # Hidden: x, a and r, which fuse into the quantized r. The output's name is that of the pair;
    # f is read in float, too.
    assert held(found) == [
        ("x", "xq", 0.5),
        ("r", "rq", 0.5),
        ("f", "f", None),
        ("y", "fq", 0.5),
        ("o", "o", None),
    ]
    assert [r.zero_point for r in found.readings] == [3, 3, 0, 3, 0]


def test_what_is_no_single_grid_stays_float() -> None:
    text = """{
        w = QuantizeLinear(c, s, z)   wd = DequantizeLinear(w, s, z)
        a = Mul(x, wd)
        q = QuantizeLinear(a, c, cz)   d = DequantizeLinear(q, c, cz)
        e = Neg(d)
        t = QuantizeLinear(e, n, z)   y = DequantizeLinear(t, n, z)
    }"""
    found = view(graph("(float[2,2] x, float n) => (float[2,2] y) " + SCALES + text))
    assert found.kind == "float"
    assert held(found) == [(n, n, None) for n in ("x", "n", "a", "e", "y")]


def test_a_bias_and_its_activation_are_inside_the_quantized_product() -> None:
    text = """<float s = {0.5}, uint8 z = {3}, float[2,2] w = {1,2,3,4}, float[2] b = {1,2}> {
        m = MatMul(x, w)   p = Add(m, b)   r = Relu(p)
        q = QuantizeLinear(r, s, z)   d = DequantizeLinear(q, s, z)
        k = Relu(d)   y = Neg(k)
    }"""
    assert held(view(graph("(float[2,2] x) => (float[2,2] y) " + text))) == [
        ("x", "x", None),
        ("r", "q", 0.5),
        ("k", "k", None),
        ("y", "y", None),
    ]


INTEGER = """(float[2] x) => (float[2] y) <float s = {0.5}, int8 z = {3}> {
    xq = QuantizeLinear(x, s, z)   wide = Cast<to = 6>(xq)   neg = Neg(wide)
    yq = Cast<to = 3>(neg)   y = DequantizeLinear(yq, s, z)
}"""


def test_metadata_tell_what_integers_mean() -> None:
    grids = {"xq": ["x", 0.5, 3], "neg": ["a", 0.25, 0], "yq": ["y", 0.5, 3], "gone": ["g", 1, 0]}
    found = view(graph(INTEGER, grids))
    assert found.kind == "integer"
    assert held(found) == [("x", "xq", 0.5), ("a", "neg", 0.25), ("y", "yq", 0.5)]
    assert [reading.dtype.name for reading in found.readings] == ["int8", "int32", "int8"]


def test_without_metadata_the_boundary_is_known() -> None:
    assert held(view(graph(INTEGER))) == [("x", "xq", 0.5), ("y", "y", None)]


@pytest.mark.parametrize("text", ["{", "[]", '{"xq": 3}', '{"xq": ["x", "a", 1]}', '{"xq": ["x"]}'])
def test_metadata_that_cannot_be_read_are_one_line(text: str) -> None:
    with pytest.raises(IntqError, match=r"onnx_intq\.grids cannot be read"):
        view(graph(INTEGER, text))


def test_a_model_that_takes_integers_is_fed_real_values() -> None:
    text = (
        "(int8[2] x, int64 n) => (int8[2] y) { a = Cast<to = 6>(x) b = Neg(a) y = Cast<to = 3>(b) }"
    )
    found = view(graph(text, {"x": ["x", 0.5, 3], "y": ["y", 0.5, 3]}))
    assert [str(spec) for spec in found.inputs] == ["x (float32 [2])", "n (int64 [])"]
    feeds = found.feeds({"x": np.array([1, -1], np.float32), "n": np.array(4)})
    assert feeds["x"].tolist() == [5, 1]
    assert feeds["x"].dtype == np.int8
    assert feeds["n"] == 4


def test_the_counterpart_is_of_the_same_grid_then_real_then_any() -> None:
    mine, other = integer("int8", 0.1, 0), integer("uint8", 0.3, 0)
    assert counterpart(mine, {"t": [other, REAL, mine]}) is mine
    assert counterpart(mine, {"t": [other, REAL]}) is REAL
    assert counterpart(mine, {"t": [other]}) is other
    assert counterpart(mine, {"u": [mine]}) is None
