"""Tensors stay within their intervals, and what leaves its type was a risk, on onnxruntime."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model
from onnx_intq.interval_rules import LARGEST_SIZE
from onnx_intq.intervals import bounds, limits
from onnx_intq.runtime import Session

Array = npt.NDArray[Any]
UNARY = ("Neg", "Abs", "Sign", "Identity", "Relu")
BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mod")
EXACT: dict[str, Callable[[int, int], int]] = {
    "Add": lambda x, y: x + y,
    "Sub": lambda x, y: x - y,
    "Mul": lambda x, y: x * y,
}


def model(text: str, opset: int = 18) -> gs.Graph:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>{text}')
    return graph_from_model(proto)


def run(text: str, feeds: dict[str, Array]) -> tuple[gs.Graph, dict[str, Array]]:
    """The graph and all its tensors; nothing is fused."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]>{text}')
    inferred = onnx.shape_inference.infer_shapes(proto)
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(v for v in inferred.graph.value_info if v.name not in known)
    return graph_from_model(proto), feeds | Session(proto, threads=1, optimize=False).run(feeds)


@st.composite
def programs(draw: st.DrawFn) -> str:
    """Chains of elementwise operators on two int32 inputs cast from int8, and constants."""
    names, lines = ["a", "b"], list[str]()
    for number in range(draw(st.integers(1, 6))):
        op = draw(st.sampled_from((*UNARY, *BINARY, "Clip", "Where", "Shift")))
        some = st.sampled_from(names)
        value = draw(st.integers(-300, 300))
        constant = f"k{number} = Constant<value = int32 {{{value}}}>()"
        new = f"t{number}"
        x, y = draw(some), draw(st.sampled_from((*names, f"k{number}")))
        if op in {"Div", "Mod"}:
            constant = f"k{number} = Constant<value = int32 {{{abs(value) + 1}}}>()"
            y = f"k{number}"
        if op in UNARY:
            lines.append(f"{new} = {op}({x})")
        elif op == "Clip":
            low = f"l{number} = Constant<value = int32 {{{value - 50}}}>()"
            lines += [low, constant, f"{new} = Clip({x}, l{number}, k{number})"]
        elif op == "Where":
            lines += [
                constant,
                f"c{number} = Less({x}, {y})",
                f"{new} = Where(c{number}, {x}, {y})",
            ]
        elif op == "Shift":
            lines += [
                f"s{number} = Constant<value = int64 {{{abs(value)}}}>()",
                f"w{number} = Cast<to = 7>({x})",
                f"m{number} = Mul(w{number}, s{number})",
                f"{new} = Cast<to = 6>(m{number})",
            ]
        else:
            lines += [constant, f"{new} = {op}({x}, {y})"]
        names.append(new)
    body = "\n".join(lines)
    return f"""g (int8[64] x, int8[64] y) => (int32[64] z) {{
        a = Cast<to = 6>(x) b = Cast<to = 6>(y)
        {body}
        z = Identity({names[-1]}) }}"""


@settings(max_examples=150, deadline=None)
@given(text=programs(), seed=st.integers(0, 2**32 - 1))
def test_tensors_stay_within_their_intervals(text: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    ends = [[-128, -128, 127, 127, 0, 0, -1, 1], [-128, 127, -128, 127, 0, 1, -1, 0]]
    feeds = {
        name: np.concatenate([end, random.integers(-128, 128, 56)]).astype(np.int8)
        for name, end in zip("xy", ends, strict=True)
    }
    graph, values = run(text, feeds)
    found = bounds(graph)
    assert {"x", "y", "a", "b", "z"} <= found.intervals.keys()
    for name, value in values.items():
        low, high = found.intervals.get(name, (value.min(), value.max()))  # a constant nobody reads
        assert low <= int(value.min()), name
        assert int(value.max()) <= high, name
    risky = {risk.tensor for risk in found.risks}
    constants = {n: t.values for n, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    for node in graph.nodes:
        if node.op in EXACT and node.outputs[0].name not in risky:
            pair = [(values | constants)[t.name].astype(object) for t in node.inputs]
            exact = EXACT[node.op](*pair)
            assert np.array_equal(exact, values[node.outputs[0].name]), node.op


WEIGHTED = {
    "ConvInteger": "(x, w, zx, zw)",
    "left": "(w, x, zw, zx)",
    "right": "(x, w, zx, zw)",
}


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(WEIGHTED)),
    zero=st.integers(0, 255),
    per_channel=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_sums_of_products_with_constant_weights_have_exact_bounds(
    form: str, zero: int, per_channel: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    weights = random.integers(-128, 128, (4, 3), dtype=np.int8)
    zeros = random.integers(-9, 9, 4 if per_channel else (), dtype=np.int8)
    op, shape, result, order = "MatMulInteger", "3, 2", "4, 2", weights
    if form == "ConvInteger":
        op, shape, result, order = form, "1, 3, 2", "1, 4, 2", weights[:, :, None]
    elif form == "right":
        shape, result, order = "2, 3", "2, 4", weights.T
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        g (uint8[{shape}] x) => (int32[{result}] y) <uint8 zx = {{{zero}}}> {{
            y = {op}{WEIGHTED[form]} }}"""
    )
    for name, value in (("w", order), ("zw", zeros)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    found = bounds(graph_from_model(proto))
    assert found.risks == ()
    # The bounds are reached: each channel's weights say which inputs are 0 and which 255.
    centred = weights.astype(np.int64) - zeros.astype(np.int64).reshape(-1, 1)
    highest = (centred * (np.where(centred > 0, 255, 0) - zero)).sum(1)
    lowest = (centred * (np.where(centred > 0, 0, 255) - zero)).sum(1)
    assert found.intervals["y"] == (lowest.min(), highest.max())


def interval(line: str, opset: int = 18) -> tuple[int, int]:
    """The interval of `t`, from `a` in -128..127, `b` in 0..255, `c` in 0..1, `n` any int64."""
    text = f"""g (int8[2, 3, k] a, uint8[2, 3, k] b, bool[2, 3, k] c, int64[1] n) => (int64 z)
        <int64 zero = {{0}}, int64 five = {{5}}, int64[1] axis = {{1}}, int64[1] last = {{2}},
         uint8 two = {{2}}, uint8 huge = {{8}}, int64[2] none = {{0, 0}}> {{
            wide = Cast<to = 7>(a)
            up = Cast<to = 7>(b)
            {line}
            z = Identity(five) }}"""
    return bounds(model(text, opset)).intervals["t"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("t = Abs(wide)", (0, 128)),
        ("m = Max(wide, five) t = Abs(m)", (5, 127)),
        ("m = Min(wide, five) n = Sub(m, five) t = Neg(n)", (0, 133)),
        ("t = Sign(up)", (0, 1)),
        ("t = Mul(wide, wide)", (0, 128 * 128)),
        ("m = Add(up, five) t = Mul(m, m)", (25, 260 * 260)),
        ("t = Div(wide, five)", (-25, 25)),
        ("n = Neg(five) t = Div(wide, n)", (-25, 25)),
        ("t = Mod(wide, five)", (0, 4)),
        ("t = Mod<fmod = 1>(wide, five)", (-4, 4)),
        ("t = Mod<fmod = 1>(up, five)", (0, 4)),
        ("t = Clip(wide, zero)", (0, 127)),
        ("t = Clip(wide, , five)", (-128, 5)),
        ('t = BitShift<direction = "RIGHT">(b, two)', (0, 63)),
        ("t = Less(wide, five)", (0, 1)),
        ("t = Not(c)", (0, 1)),
        ("t = Cast<to = 9>(wide)", (0, 1)),
        ("t = Where(c, wide, up)", (-128, 255)),
        ("t = Concat<axis = 0>(wide, up)", (-128, 255)),
        ("t = Transpose(wide)", (-128, 127)),
        ("t, s = Split<axis = 2, num_outputs = 2>(up)", (0, 255)),
        ("s, t = Split<axis = 2, num_outputs = 2>(up)", (0, 255)),
        ("one = Identity(axis) v, t = TopK(up, one)", (-(2**63), 2**63 - 1)),
        ("t = ArgMax(wide)", (0, LARGEST_SIZE)),
        ("f = Cast<to = 1>(a) t = QuantizeLinear(f, scale, two)", (0, 255)),
        ("t = Shape(a)", (0, LARGEST_SIZE)),
        ("s = Shape(a) t = ConstantOfShape<value = int64[1] {7}>(s)", (7, 7)),
        ("t = Range(zero, five, five)", (0, 5)),
        ("t = Trilu(up)", (0, 255)),
        ("m = Add(up, five) t = Pad(m, pads)", (0, 260)),
        ('m = Add(up, five) t = Pad<mode = "edge">(m, pads)', (5, 260)),
        ("t = Pad(up, pads, five)", (0, 255)),
        ("t = ReduceSum(up, axis)", (0, 765)),
        ("t = ReduceSum<noop_with_empty_axes = 1>(up)", (0, 255)),
        ("t = ReduceMax(up, axis)", (0, 255)),
        ("t = CumSum(wide, axis)", (-384, 381)),
    ],
)
def test_operators_have_the_bounds_of_their_exact_results(
    line: str, expected: tuple[int, int]
) -> None:
    pads = "pads = Constant<value = int64[6] {0, 0, 1, 0, 0, 1}>() "
    assert interval(pads * ("pads" in line) + line) == expected


def test_padding_of_a_convolution_adds_nothing() -> None:
    text = """g (bool[1, 1, 4] c) => (int32[1, 1, 4] y)
        <uint8 low = {3}, uint8 high = {9}, int8[1, 1, 3] w = {1, 2, 3}> {
            x = Where(c, low, high) y = ConvInteger<pads = [1, 1]>(x, w) }"""
    assert bounds(model(text)).intervals["y"] == (0, 54)


def test_a_product_of_two_inputs_needs_their_length() -> None:
    text = "g (uint8[2, %s] a, int8[%s, 3] b) => (int32[2, 3] y) { y = MatMulInteger(a, b) }"
    assert bounds(model(text % (5, 5))).intervals["y"] == (5 * 255 * -128, 5 * 255 * 127)
    (risk,) = bounds(model(text % ("k", "k"))).risks
    assert not risk.bounded
    assert risk.why == "MatMulInteger adds up along an axis of unknown length"
    vector = "g (uint8[5] a, int8[5] b) => (int32 y) { y = MatMulInteger(a, b) }"
    assert bounds(model(vector)).intervals["y"] == (5 * 255 * -128, 5 * 255 * 127)


def test_huge_weights_are_counted_without_wrapping() -> None:
    text = """g (int64[1, 2] x) => (int64[1, 1] y) <int64[2, 1] w = {4611686018427387904, 1}> {
        y = MatMul(x, w) }"""
    (risk,) = bounds(model(text)).risks
    assert f"{2**62 * (2**63 - 1) + 2**63 - 1}" in risk.why
    empty = "g (int8[1, 0] x) => (int32[1, 3] y) <int8[0, 3] w = {}> { y = MatMulInteger(x, w) }"
    assert bounds(model(empty)).intervals["y"] == (0, 0)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("t = Mul(n, n)", "may leave int64"),
        ("t = Sub(b, two)", "Sub: -2..253 may leave uint8"),
        ("t = Neg(a)", "Neg: -127..128 may leave int8"),
        ("t = Cast<to = 3>(b)", "Cast: 0..255 may leave int8"),
        ("t = Div(five, wide)", "Div may divide by 0"),
        ("t = Mod(five, wide)", "Mod may have a divisor below 1"),
        ('t = BitShift<direction = "LEFT">(b, two)', "BitShift: 0..1020 may leave uint8"),
        ('t = BitShift<direction = "LEFT">(b, huge)', "BitShift may shift by all bits of its type"),
        ("t = ReduceSum(wide, last)", "ReduceSum adds up along an axis of unknown length"),
        ("t = ReduceSum(wide)", "ReduceSum adds up along an axis of unknown length"),
        ("t = ReduceSum(wide, n)", "ReduceSum adds up along an axis of unknown length"),
        ("t = ReduceSum(n, first)", "ReduceSum may pass 2^53, above which onnxruntime rounds"),
        ("t = Mod<fmod = 1>(n, five)", "Mod may pass 2^53, above which onnxruntime rounds"),
        ("t = CumSum(wide, n)", "CumSum adds up along an axis of unknown length"),
        ("t = CumSum(wide, last)", "CumSum adds up along an axis of unknown length"),
        ("t = ConvInteger(b, a)", "ConvInteger has weights that are not constant"),
        ("t = BitwiseNot(a)", "BitwiseNot has no rule"),
        ("f = Cast<to = 1>(a) t = Cast<to = 6>(f)", "Cast reads a tensor without bounds"),
    ],
)
def test_what_may_leave_its_type_is_a_risk(line: str, why: str) -> None:
    text = f"""g (int8[2, 3, k] a, uint8[2, 3, k] b, int64[1] n) => (int64 z)
        <int64 five = {{5}}, int64[1] first = {{0}}, int64[1] last = {{2}}, uint8 two = {{2}},
         uint8 huge = {{8}}> {{
            wide = Cast<to = 7>(a)
            {line}
            z = Identity(five) }}"""
    graph = model(text)
    found = bounds(graph)
    (risk,) = found.risks
    assert (risk.tensor, risk.why.endswith(why), risk.bounded) == ("t", True, ":" in risk.why)
    assert found.intervals["t"] == limits(graph.tensors()["t"])


def test_a_branch_counts_with_its_own_bounds_and_a_loop_with_none() -> None:
    text = """g (bool c, int8[4] x, int64 n) => (int8[4] y, int8[4] r, float[4] f, int8[4] u)
        <int8 five = {5}, int8 zero = {0}> {
            y = If(c) <
                then_branch = a () => (int8[4] p) { p = Min(x, five) },
                else_branch = b () => (int8[4] q) { q = Max(x, five) }>
            s = If(c) <
                then_branch = a2 () => (int8[4] p2) { p2 = Clip(x, zero, five) },
                else_branch = b2 () => (int8[4] q2) { q2 = Max(zero, five) }>
            r = Identity(s)
            f = If(c) <
                then_branch = a3 () => (float[4] p3) { p3 = Cast<to = 1>(x) },
                else_branch = b3 () => (float[4] q3) { q3 = Cast<to = 1>(x) }>
            u = Loop(n, c, s) <body = d (int64 i, bool go, int8[4] v) => (bool on, int8[4] w) {
                on = Identity(go)
                w = Sub(v, five) }>
        }"""
    found = bounds(model(text))
    assert found.intervals["y"] == (-128, 127)
    assert found.intervals["r"] == (0, 5)
    assert found.intervals["u"] == (-128, 127)
    assert "f" not in found.intervals
    assert [(risk.tensor, risk.why) for risk in found.risks] == [
        ("w", "Sub: -133..122 may leave int8")
    ]


def test_a_layer_of_a_quantized_network_cannot_overflow() -> None:
    text = """g (uint8[1, 2, t] q) => (int8[1, 3, t] y)
        <uint8 zx = {128}, uint8 zw = {128}, uint8[3, 2, 1] w = {0, 255, 3, 4, 5, 200},
         int64[3, 1] bias = {1000, -2000, 3000}, int64 b = {1518500250}, int64 c = {16777216},
         int64 half = {8388608}, int64 steps = {1048576}, int64 low = {-128}, int64 high = {127}> {
            acc = ConvInteger(q, w, zx, zw)
            wide = Cast<to = 7>(acc)
            biased = Add(wide, bias)
            product = Mul(biased, b)
            rounded = Add(product, half)
            shifted = Div(rounded, c)
            clipped = Clip(shifted, low, high)
            y = Cast<to = 3>(clipped)
        }"""
    found = bounds(model(text))
    assert found.risks == ()
    assert found.intervals["acc"] == (-128 * 127 - 127 * 128, 128 * 128 + 127 * 127)
    assert found.intervals["y"] == (-128, 127)


def test_sums_above_2_to_the_53_are_rounded_by_onnxruntime() -> None:
    # Why such sums are risks: once this fails, they need be none.
    text = """g (int64[3] x) => (int64[1] y) <int64[1] axes = {0}> { y = ReduceSum(x, axes) }"""
    _, values = run(text, {"x": np.array([2**62 + 1, -1, 1])})
    assert values["y"] == [2**62]
