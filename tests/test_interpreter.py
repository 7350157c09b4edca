"""Integer graphs give onnxruntime's integers on every tensor, and differences are found."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest

from onnx_intq.graph import graph_from_model, save
from onnx_intq.integer_ops import OPS
from onnx_intq.interpreter import Difference, Interpreter, SideBySide, differences
from onnx_intq.runtime import Session
from onnx_intq.transform import IntqError

HEADER = '<ir_version: 10, opset_import: ["" : 21]> g '
RANDOM = np.random.default_rng(0)


def model(text: str, **weights: npt.NDArray[Any]) -> onnx.ModelProto:
    found = onnx.parser.parse_model(HEADER + text)
    tensors = [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()]
    found.graph.initializer.extend(tensors)
    return found


SEPARABLE = """(float[n, 8, t] audio) => (float[n, 16, u] logits)
    <float s = {0.05}, int8 z = {3}, uint8 zw = {128}, int8 zy = {-128}, int64 low = {0},
     int64 high = {255}, float so = {0.1}, uint8 zo = {7}> {
    x = QuantizeLinear(audio, s, z)
    a1 = ConvInteger<group=8, pads=[8, 8], strides=[2], dilations=[2]>(x, w1, z, zw)
    m1 = Cast<to=7>(a1) p1 = Mul(m1, b1) o1 = Add(p1, c1) d1 = Div(o1, e1)
    k1 = Clip(d1, low, high) y1 = Cast<to=2>(k1)
    a2 = ConvInteger(y1, w2, zo, zw)
    m2 = Cast<to=7>(a2) p2 = Mul(m2, b2) f2 = Add(p2, c2) r2 = Max(f2, low) d2 = Div(r2, e2)
    k2 = Clip(d2, low, high) y2 = Cast<to=2>(k2)
    logits = DequantizeLinear(y2, so, zo)
}"""
"""Depthwise and pointwise convolution, each requantized in integers."""


def separable() -> onnx.ModelProto:
    def multipliers(channels: int) -> npt.NDArray[np.int64]:
        return RANDOM.integers(2**30, 2**31, (1, channels, 1))

    return model(
        SEPARABLE,
        w1=RANDOM.integers(0, 256, (8, 1, 9), np.uint8),
        b1=multipliers(8),
        c1=RANDOM.integers(-(2**45), 2**45, (1, 8, 1)),
        e1=np.array(2**40),
        w2=RANDOM.integers(0, 256, (16, 8, 1), np.uint8),
        b2=multipliers(16),
        c2=RANDOM.integers(-(2**45), 2**45, (1, 16, 1)),
        e2=np.array(2**39),
    )


ATTENTION = """(int8[h, t, d] q, uint8[h, d, t] k, int8[h, t, d] v, int64[h] lengths)
    => (uint8[h, t, d] y)
    <int64[1] last = {-1}, int64 low = {0}, int64 high = {255}> {
    a = MatMulInteger(q, k)
    m = ReduceMax(a, last) g = Sub(m, a) f = Div(g, step) i = Min(f, top) e = Gather(table, i)
    n = Shape<start=1, end=2>(q) c = Squeeze(n) r = Range(zero, c, one)
    w = Unsqueeze(lengths, last) l = Unsqueeze(w, last) b = Less(r, l) u = Cast<to=2>(b)
    x = Mul(e, u)
    o = MatMulInteger(x, v)
    x32 = Cast<to=6>(x) s = ReduceSum(x32, last) s64 = Cast<to=7>(s) s1 = Max(s64, one)
    o64 = Cast<to=7>(o) o8 = Mul(o64, scale) d = Mod(o8, s1) h = Sub(o8, d) j = Div(h, s1)
    z = Add(j, middle) y64 = Clip(z, low, high) y = Cast<to=2>(y64)
}"""
"""Attention with a table of exponentials, normalised after the product, masked by lengths."""


def attention() -> onnx.ModelProto:
    return model(
        ATTENTION,
        step=np.array(50, np.int32),
        top=np.array(255, np.int32),
        table=np.rint(255 * np.exp(-np.arange(256) / 40)).astype(np.uint8),
        zero=np.array(0),
        one=np.array(1),
        scale=np.array(3),
        middle=np.array(128),
    )


CASES = {
    "separable": (separable(), {"audio": RANDOM.normal(size=(2, 8, 40)).astype(np.float32)}),
    "attention": (
        attention(),
        {
            "q": RANDOM.integers(-128, 128, (2, 12, 8), np.int8),
            "k": RANDOM.integers(0, 256, (2, 8, 12), np.uint8),
            "v": RANDOM.integers(-128, 128, (2, 12, 8), np.int8),
            "lengths": np.array([12, 5]),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_that_of_onnxruntime(name: str) -> None:
    found, feeds = CASES[name]
    assert differences(found, feeds) == []
    assert SideBySide(found, size=3).run(feeds) == []


@pytest.mark.parametrize("name", CASES)
def test_the_outputs_are_those_of_the_optimised_model(name: str) -> None:
    found, feeds = CASES[name]
    have, want = Interpreter(found).run(feeds), Session(found, threads=1).run(feeds)
    assert have.keys() == want.keys()
    for key, values in want.items():
        np.testing.assert_array_equal(have[key], values)
        assert len(np.unique(values)) > 20  # neither constant nor all clipped


def test_all_tensors_are_given_by_name() -> None:
    found, feeds = CASES["separable"]
    interpreter = Interpreter(found)
    everything = interpreter.run_all(feeds)
    made = [name for node in found.graph.node for name in node.output]
    assert list(everything) == list(interpreter.tensors) == ["audio", *made]
    assert everything["a1"].dtype == np.int32
    np.testing.assert_array_equal(everything["logits"], interpreter.run(feeds)["logits"])


def test_a_planted_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OPS["Max"]

    def off_by_two(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Any:
        y: Any = real(a, b)
        y.flat[3] -= 2
        return y

    found, feeds = CASES["separable"]
    monkeypatch.setitem(OPS, "Max", off_by_two)
    first, *_ = differences(found, feeds)
    assert first == Difference("r2", 1, 2.0)


@pytest.mark.parametrize(
    ("wrong", "want"),
    [
        (np.zeros(3, np.int16), Difference("y", 3, np.inf)),
        (np.zeros((3, 1), np.int64), Difference("y", 3, np.inf)),
        (np.array([-(2**63), 0, 0]), Difference("y", 1, 2.0**64 - 1)),
    ],
)
def test_types_shapes_and_large_differences_count(
    monkeypatch: pytest.MonkeyPatch, wrong: npt.NDArray[Any], want: Difference
) -> None:
    def identity(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return wrong

    monkeypatch.setitem(OPS, "Identity", identity)
    graph = model("(int64[3] x) => (int64[3] y) { y = Identity(x) }")
    assert differences(graph, {"x": np.array([2**63 - 1, 0, 0])}) == [want]


def test_not_a_number_equals_itself() -> None:
    graph = model("(float[2] x) => (float[2] y) { y = Transpose(x) }")
    assert differences(graph, {"x": np.array([np.nan, 1], np.float32)}) == []


def test_models_come_as_graphs_and_files(tmp_path: Path) -> None:
    found, feeds = CASES["separable"]
    graph = graph_from_model(found)
    save(graph, tmp_path / "m.onnx")
    graph.nodes.reverse()
    want = Interpreter(found).run(feeds)["logits"]
    for each in (graph, tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        np.testing.assert_array_equal(Interpreter(each).run(feeds)["logits"], want)
    assert graph.nodes[0].op == "DequantizeLinear"


def test_a_branch_is_compared_with_onnxruntime() -> None:
    graph = model(
        """(int8[n] x, bool c) => (int8[n] y) {
        z = Add(x, x)
        y = If (c) <
            then_branch = yes () => (int8[n] p) { p = Neg(z) },
            else_branch = no () => (int8[n] q) { q = Mul(z, x) }
        > }"""
    )
    x = np.array([-128, 127, 5], np.int8)
    for condition in (True, False):
        assert differences(graph, {"x": x, "c": np.array(condition)}) == []


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "feeds lack input 'audio'"),
        ({"audio": np.zeros((1, 8, 40), np.float32), "z": np.zeros(1)}, "feeds hold 'z'"),
        ({"audio": np.zeros((1, 8, 40), np.int8)}, "input 'audio' is int8"),
        ({"audio": np.zeros((1, 9, 40), np.float32)}, r"has shape \[1, 9, 40\]"),
    ],
)
def test_feeds_must_fit(feeds: dict[str, npt.NDArray[Any]], message: str) -> None:
    interpreter = Interpreter(CASES["separable"][0])
    with pytest.raises(IntqError, match=message):
        interpreter.run(feeds)
    with pytest.raises(IntqError, match=message):
        interpreter.run_all(feeds)


def test_sequences_are_refused() -> None:
    graph = model("(seq(int8[2]) x) => (int64 n) { n = SequenceLength(x) }")
    with pytest.raises(IntqError, match="input 'x' is a sequence; expected a tensor"):
        Interpreter(graph)


def test_a_tensor_of_unknown_type_cannot_be_compared() -> None:
    text = "(int8[2] x) => (int8[] y) { z = Unsqueeze(x, a) y = Abs(z) }"
    with pytest.raises(
        IntqError, match="the type of tensor 'z' cannot be inferred; check its node"
    ):
        SideBySide(model(text, a=np.array([5])))


def test_an_invalid_model_is_refused() -> None:
    with pytest.raises(IntqError, match=r"shapes cannot be inferred .*Unsqueeze"):
        Interpreter(model("(int8[2] x) => (int8[2] y) { y = Unsqueeze(x) }"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match=r"gone\.onnx: no such file"):
        Interpreter(tmp_path / "gone.onnx")
