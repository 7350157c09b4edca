"""Tensors stay within their intervals, and what leaves its type was a risk, on onnxruntime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, load
from onnx_intq.interval_arithmetic import Box
from onnx_intq.intervals import bounds, limits
from onnx_intq.models.export import export_named
from onnx_intq.progress import bar
from onnx_intq.quantize import quantize
from onnx_intq.recipes import pipeline
from onnx_intq.runtime import Session
from onnx_intq.source import Source

Array = npt.NDArray[Any]
DIGITS = Path(__file__).parent.parent / "models" / "pretrained" / "digits" / "manifest.json"
SHAPES = {"": 1, "[3,1]": 3, "[4]": 4, "[1,3,1]": 3}
"""Of constants beside tensors [16, 3, 4] -> the number of their elements."""
UNARY = ("Neg", "Abs", "Sign", "Identity", "Relu")
BINARY = ("Add", "Sub", "Mul", "Max", "Min")
DIVIDING = ("Div", "Mod", "Remainder")
EXACT: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda x, y: x + y,
    "Sub": lambda x, y: x - y,
    "Mul": lambda x, y: x * y,
}
FORMS = {
    **dict.fromkeys(UNARY, "t{i} = {op}({x})"),
    **dict.fromkeys(BINARY, "t{i} = {op}({x}, {y})"),
    **dict.fromkeys(DIVIDING, "t{i} = {op}({x}, k{i})"),
    "Remainder": "q{i} = Div({x}, k{i}) p{i} = Mul(k{i}, q{i}) t{i} = Sub({x}, p{i})",
    "Below": "r{i} = ReduceMax({x}, last) t{i} = Sub(r{i}, {x})",
    "Clip": "t{i} = Clip({x}, zero, h{i})",
    "Largest": "c{i} = Less({x}, {y}) t{i} = Where(c{i}, {y}, {x})",
    "Raised": "o{i} = Clip({x}, zero, top) w{i} = Add(o{i}, h{i}) s{i} = Cast<to = 3>(w{i}) "
    "t{i} = Cast<to = 6>(s{i})",
    "Smallest": "c{i} = GreaterOrEqual({x}, {y}) t{i} = Where(c{i}, {y}, {x})",
    "Turn": "v{i} = Transpose<perm = [0, 2, 1]>({x}) t{i} = Transpose<perm = [0, 2, 1]>(v{i})",
    "Where": "c{i} = Less({x}, {y}) t{i} = Where(c{i}, {y}, b)",
    "Wide": "w{i} = Cast<to = 7>({x}) m{i} = Mul(w{i}, far) t{i} = Cast<to = 6>(m{i})",
    "Wrap": "w{i} = Cast<to = {narrow}>({x}) t{i} = Cast<to = 6>(w{i})",
}
PROGRAM = """g (int8[16, 3, 4] x, int8[16, 3, 4] y, uint8[16, 3, 4] u) => (int32[16, 3, 4] z)
    <uint8[3, 3, 1] w = {{0, 255, 3, 128, 127, 129, 9, 200, 1}}, int64[1] last = {{-1}},
     uint8[3, 3] m = {{0, 255, 3, 128, 127, 129, 9, 200, 1}}, uint8[4] zn = {{0, 128, 255, 9}},
     uint8[4, 4] n = {{0, 255, 3, 128, 127, 129, 9, 200, 1, 0, 0, 0, 7, 7, 7, 7}},
     uint8 zu = {{120}}, uint8 zw = {{128}}, int32 zero = {{0}}, int32 top = {{99}},
     int64 far = {{77}}> {{
        a = Cast<to = 6>(x)
        b = Cast<to = 6>(y)
        c = ConvInteger(u, w, zu, zw)
        d = MatMulInteger(m, u, zw, zu)
        e = MatMulInteger(u, n, zu, zn)
        {lines}
        z = Identity(t{last}) }}"""


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


def holds(found: Box, values: Array) -> bool:
    low, high = (end.astype(object) for end in (found.low, found.high))
    assert np.broadcast(low, values).size == values.size
    return bool(((low <= values.astype(object)) & (values.astype(object) <= high)).all())


@st.composite
def programs(draw: st.DrawFn) -> str:
    """Chains of operators on int32 tensors and constants, some of these one for each channel."""
    names, lines = list("abcde"), list[str]()
    for i in range(draw(st.integers(1, 6))):
        op = draw(st.sampled_from(sorted(FORMS)))
        shape = draw(st.sampled_from(sorted(SHAPES)))
        ends = (1, 300) if op in DIVIDING else (-300, 300)
        values = [draw(st.integers(*ends)) for _ in range(SHAPES[shape])]
        y = draw(st.sampled_from((*names, f"k{i}", f"k{i}")))
        choices = {"x": draw(st.sampled_from(names)), "y": y, "narrow": draw(st.integers(2, 5))}
        lines += [
            f"k{i} = Constant<value = int32{shape} {{{str(values)[1:-1]}}}>()",
            f"h{i} = Constant<value = int32 {{{abs(values[0])}}}>()",
            FORMS[op].format(i=i, op=op, **choices),
        ]
        names.append(f"t{i}")
    return PROGRAM.format(lines="\n".join(lines), last=i)


@settings(max_examples=100, deadline=None)
@given(text=programs(), seed=st.integers(0, 2**32 - 1))
def test_tensors_stay_within_their_intervals(text: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    feeds = {name: random.integers(-128, 128, (16, 3, 4)).astype(np.int8) for name in "xy"}
    feeds["u"] = random.integers(0, 256, (16, 3, 4)).astype(np.uint8)
    for values in feeds.values():  # the ends
        kind = np.iinfo(values.dtype)
        values[:12] = random.choice([kind.min, kind.max, 0], (12, 3, 4))
    graph, values_ = run(text, feeds)
    found = bounds(graph)
    assert {"x", "y", "a", "b", "z"} <= found.intervals.keys()
    for name, value in values_.items():
        if name in found.boxes:  # all but constants nobody reads
            assert holds(found.boxes[name], value), name
            low, high = found.intervals[name]
            assert low <= value.min() <= value.max() <= high
    risky = {risk.tensor for risk in found.risks}
    constants = {n: t.values for n, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    for node in graph.nodes:
        result = node.outputs[0].name
        operands = [(values_ | constants)[t.name].astype(object) for t in node.inputs]
        if node.op in EXACT and result not in risky:
            assert np.array_equal(EXACT[node.op](*operands), values_[result]), node.op
        if node.op == "Cast" and result not in risky:
            assert len(np.unique(operands[0] - values_[result])) == 1, "wrapped by several numbers"


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
        ("t = ReduceSum(b32, last)", "ReduceSum adds up along an axis of unknown length"),
        ("t = ReduceSum(b32)", "ReduceSum adds up along an axis of unknown length"),
        ("t = ReduceSum(b32, n)", "ReduceSum adds up along an axis of unknown length"),
        (
            "m = Mul(wide, huge64) t = ReduceSum(m, n)",
            "ReduceSum adds up along an axis of unknown length",
        ),
        ("t = ReduceSum(n, first)", "ReduceSum may pass 2^53, above which onnxruntime rounds"),
        ("t = Mod<fmod = 1>(n, five)", "Mod may pass 2^53, above which onnxruntime rounds"),
        ("t = CumSum(b32, n)", "CumSum adds up along an axis of unknown length"),
        ("t = CumSum(b32, last)", "CumSum adds up along an axis of unknown length"),
        ("t = ConvInteger(b, a)", "ConvInteger has weights that are not constant"),
        ("t = Cast<to = 3>(near)", "Cast: 0..128 may leave int8"),
        (
            "t = Max(n, five)",
            "Max may leave int32, beyond which onnxruntime compares int64 wrongly",
        ),
        (
            "t = Clip(five, , n)",
            "Clip may leave int32, beyond which onnxruntime compares int64 wrongly",
        ),
        (
            "t = ReduceMax(n, first)",
            "ReduceMax may leave int32, beyond which onnxruntime compares int64 wrongly",
        ),
        ("t = BitwiseNot(a)", "BitwiseNot has no rule"),
        ("f = Cast<to = 1>(a) t = Cast<to = 6>(f)", "Cast reads a tensor without bounds"),
    ],
)
def test_what_may_leave_its_type_is_a_risk(line: str, why: str) -> None:
    text = f"""g (int8[2, 3, k] a, uint8[2, 3, k] b, int64[1] n) => (int64 z)
        <int64 five = {{5}}, int64[1] first = {{0}}, int64[1] last = {{2}}, uint8 two = {{2}},
         int32 most = {{128}}, int64 huge64 = {{4194304}}, uint8 huge = {{8}}> {{
            wide = Cast<to = 7>(a)
            b32 = Cast<to = 6>(b)
            least = Min(b32, most)
            near = Cast<to = 2>(least)
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


LAYER = """g (uint8[1, 2, t] q) => (int8[1, 3, t] y)
    <uint8 zx = {{128}}, uint8 zw = {{128}}, uint8[3, 2, 1] w = {{0, 255, 130, 127, 120, 128}},
     int32[3, 1] factor = {{66000, {middle}, 268000}}, int32[3, 1] offset = {{1, -2, {last}}},
     int32[3, 1] divisor = {{16777216, 500000, 1000}}, int32 low = {{128}},
     int32 high = {{{high}}}> {{
        acc = ConvInteger(q, w, zx, zw)
        product = Mul(acc, factor)
        raised = Add(product, offset)
        quotient = Div(raised, divisor)
        clipped = Clip(quotient, low, high)
        y = Cast<to = 3>(clipped)
    }}"""


def test_a_layer_of_our_own_cannot_overflow() -> None:
    found = bounds(model(LAYER.format(middle=3000000, last=1000000000, high=383)))
    assert found.risks == ()
    acc = found.boxes["acc"]
    assert acc.low.tolist() == [[-128 * 127 - 127 * 128], [-2 * 128 - 127], [-8 * 127]]
    assert acc.high.tolist() == [[128 * 128 + 127 * 127], [2 * 127 + 128], [8 * 128]]
    assert found.boxes["quotient"].low.tolist() == [[-127], [-2298], [727712]]
    assert found.intervals["clipped"] == (128, 383)
    assert found.intervals["y"] == (-128, 127)


@pytest.mark.parametrize(
    ("change", "tensors", "why"),
    [
        (
            {"middle": 6000000},
            ["product", "raised"],
            "Mul: -2298000000..2292000000 may leave int32",
        ),
        ({"last": 2000000000}, ["raised"], "Add: -2145791999..2274432000 may leave int32"),
        ({"high": 384}, ["y"], "Cast: 128..384 may leave int8"),
    ],
)
def test_one_channel_that_may_overflow_is_found(
    change: dict[str, int], tensors: list[str], why: str
) -> None:
    constants = {"middle": 3000000, "last": 1000000000, "high": 383} | change
    found = bounds(model(LAYER.format(**constants)))
    assert [risk.tensor for risk in found.risks] == tensors
    assert found.risks[0].why == why


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [False, True])
def test_no_integer_of_the_digits_model_overflows(tmp_path: Path, lengths: bool) -> None:
    source, target = tmp_path / "float.onnx", tmp_path / "integer.onnx"
    export_named("digits", source, lengths=lengths)
    quantize(source, target, pipeline("integer"), Source(data=DIGITS), bar=bar)
    graph = load(target)
    found = bounds(graph)
    assert found.risks == ()
    products = [node for node in graph.nodes if node.op == "Mul" and "Conv" in node.name]
    spoilt = products[1:4]
    for node in spoilt:  # the factor of one channel is too large by one
        factor, acc = node.inputs[1], found.boxes[node.inputs[0].name].exact()
        channel = int(np.argmax(acc.high))
        factor.values = factor.values.copy()
        factor.values[channel] = (1 << 31) // acc.high[channel, 0] + 1
    risky = {risk.node for risk in bounds(graph).risks}
    assert len(spoilt) == 3
    assert [node.name for node in products if node.name in risky] == [n.name for n in spoilt]
