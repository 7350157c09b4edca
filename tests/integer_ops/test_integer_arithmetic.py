"""Operators on elements and over axes give onnxruntime's integers, at the extremes of each type."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_intq.integer_ops import arithmetic, cast, logic, reduce
from onnx_intq.interpreter import Interpreter, SideBySide
from onnx_intq.transform import IntqError

Feeds = dict[str, npt.NDArray[Any]]
Draw = st.DrawFn

ALL = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
NO_16 = ("int8", "uint8", "int32", "uint32", "int64", "uint64")
UNSIGNED = ("uint8", "uint32", "uint64")
ORDERED = ("int8", "uint8", "int32", "int64")
WIDE = ("int32", "int64")
BOOL = ("bool",)


def elements(dtype: str) -> st.SearchStrategy[int]:
    """Integers of a type, its ends and the neighbours of zero more often."""
    if dtype == "bool":
        return st.integers(0, 1)
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    ends = {low, low + 1, max(-1, low), 0, 1, 2, high - 1, high}
    return st.sampled_from(sorted(ends)) | st.integers(low, high)


def array(draw: Draw, dtype: str, shape: Sequence[int], among: Any = None) -> npt.NDArray[Any]:
    values = elements(dtype) if among is None else among
    return draw(hnp.arrays(np.dtype(dtype), tuple(shape), elements=values))


def arrays(draw: Draw, dtype: str, *shapes: Sequence[int]) -> list[npt.NDArray[Any]]:
    return [array(draw, dtype, shape) for shape in shapes]


def shapes(draw: Draw, count: int) -> Sequence[Sequence[int]]:
    found = draw(hnp.mutually_broadcastable_shapes(num_shapes=count, max_dims=3, max_side=4))
    return found.input_shapes


def operands(draw: Draw, dtype: str, *, names: str = "x") -> Feeds:
    """One array for each letter of `names`, of shapes that broadcast."""
    found = arrays(draw, dtype, *shapes(draw, len(names)))
    return dict(zip(names, found, strict=True))


def pair(draw: Draw, dtype: str) -> Feeds:
    return operands(draw, dtype, names="xz")


def quotient(draw: Draw, dtype: str, *, bits: int = 64) -> Feeds:
    """No division by zero; on 32 and 64 bits, where it ends onnxruntime, no lowest / -1."""
    x, z = arrays(draw, dtype, *shapes(draw, 2))
    lost = max(8 * x.itemsize - bits, 0)
    x, z = np.asarray(x >> x.dtype.type(lost)), np.asarray(z >> z.dtype.type(lost))
    z[z == 0] = 1
    if x.itemsize >= 4 and x.dtype.kind == "i":
        x[x == np.iinfo(dtype).min] = 7
    return {"x": x, "z": z}


def shift(draw: Draw, dtype: str) -> Feeds:
    first, second = shapes(draw, 2)
    amount = st.integers(0, 8 * np.dtype(dtype).itemsize + 2)
    return {"x": array(draw, dtype, first), "z": array(draw, dtype, second, amount)}


def power(draw: Draw, dtype: str) -> Feeds:
    """Powers that float64 holds, as onnxruntime computes there."""
    first, second = shapes(draw, 2)
    base = st.integers(-9, 9).filter(bool)
    exponent = array(draw, dtype, second, st.integers(-3, 9))
    return {"x": array(draw, dtype, first, base), "z": exponent}


def square(draw: Draw, dtype: str) -> Feeds:
    reach = 46340 if dtype == "int32" else 3037000499
    x = array(draw, dtype, draw(hnp.array_shapes(max_side=4)), st.integers(-reach, reach))
    return {"x": x, "z": np.array(2, dtype)}


def limits(draw: Draw, dtype: str) -> Feeds:
    names = ("x", "low", "high")
    return dict(zip(names, arrays(draw, dtype, shapes(draw, 1)[0], (), ()), strict=True))


def choice(draw: Draw, dtype: str) -> Feeds:
    first, second, third = shapes(draw, 3)
    x, z = arrays(draw, dtype, second, third)
    return {"c": array(draw, "bool", first), "x": x, "z": z}


def axes(draw: Draw, dtype: str, *, bits: int = 64) -> Feeds:
    """Integers of at most so many bits, and some of their axes."""
    x = array(draw, dtype, shapes(draw, 1)[0])
    some = draw(st.lists(st.integers(0, max(x.ndim - 1, 0)), unique=True, max_size=x.ndim))
    signs = [axis - x.ndim * draw(st.booleans()) for axis in some]
    kept = x if dtype == "bool" else x >> x.dtype.type(max(8 * x.itemsize - bits, 0))
    return {"x": np.asarray(kept), "axes": np.array(signs, np.int64)}


def axis(draw: Draw, dtype: str) -> Feeds:
    x = array(draw, dtype, draw(hnp.array_shapes(max_dims=3, max_side=4)))
    return {"x": x, "axis": np.array(draw(st.integers(-x.ndim, x.ndim - 1)), np.int64)}


def matrix(draw: Draw, dtype: str) -> Feeds:
    return {"x": array(draw, dtype, draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)))}


def first(draw: Draw, dtype: str) -> Feeds:
    x = matrix(draw, dtype)["x"]
    return {"x": x, "k": np.array([draw(st.integers(1, x.shape[1]))], np.int64)}


@dataclass(frozen=True)
class Case:
    """A graph over a type T, the types onnxruntime has it for, and what to feed."""

    graph: str
    types: Sequence[str]
    feeds: Callable[[Draw, str], Feeds]


def unary(operator: str, types: Sequence[str], result: str = "T") -> Case:
    return Case(f"(T[] x) => ({result}[] y) {{ y = {operator}(x) }}", types, operands)


def binary(
    operator: str,
    types: Sequence[str],
    result: str = "T",
    feeds: Callable[[Draw, str], Feeds] = pair,
) -> Case:
    return Case(f"(T[] x, T[] z) => ({result}[] y) {{ y = {operator}(x, z) }}", types, feeds)


def reduction(operator: str, types: Sequence[str], bits: int = 64) -> Case:
    body = f"y = {operator}(x, axes) z = {operator}<keepdims=0, noop_with_empty_axes=1>(x, axes)"
    graph = f"(T[] x, int64[n] axes) => (T[] y, T[] z) {{ {body} }}"
    return Case(graph, types, lambda draw, t: axes(draw, t, bits=bits))


def cumulative(attributes: str) -> Case:
    body = f"y = CumSum<{attributes}>(x, axis)"
    return Case(f"(T[] x, int64 axis) => (T[] y) {{ {body} }}", WIDE, axis)


def extremum(operator: str, last: int) -> Case:
    body = f"y = {operator}<axis=1, keepdims={last}, select_last_index={last}>(x)"
    return Case(f"(T[] x) => (int64[] y) {{ {body} }}", ORDERED, matrix)


def top(largest: int) -> Case:
    body = f"y, i = TopK<largest={largest}>(x, k)"
    graph = f"(T[] x, int64[1] k) => (T[] y, int64[] i) {{ {body} }}"
    return Case(graph, ("int8", "uint8", "int16", "int32", "int64"), first)


def conversion(to: str) -> Case:
    number = onnx.TensorProto.DataType.Value(to.upper())
    return unary(f"Cast<to={number}>", (*ALL, "bool"), to)


CASES: Mapping[str, Case] = {
    **{op: binary(op, ALL) for op in ("Add", "Sub", "Mul")},
    **{op: binary(op, ALL) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")},
    **{op: binary(op, NO_16) for op in ("Max", "Min")},
    **{op: binary(op, ALL, feeds=quotient) for op in ("Div", "Mod")},
    # in float64, in onnxruntime
    "Mod, fmod": binary("Mod<fmod=1>", ALL, feeds=lambda draw, t: quotient(draw, t, bits=53)),
    **{
        f"BitShift, {way}": binary(f'BitShift<direction="{way}">', UNSIGNED, feeds=shift)
        for way in ("LEFT", "RIGHT")
    },
    "Pow": binary("Pow", WIDE, feeds=power),
    "Pow, squares": binary("Pow", WIDE, feeds=square),
    "Equal": binary("Equal", (*ALL, "bool"), "bool"),
    **{op: binary(op, ALL, "bool") for op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")},
    **{op: binary(op, BOOL, "bool") for op in ("And", "Or", "Xor")},
    **{op: unary(op, ALL) for op in ("Abs", "BitwiseNot", "Identity", "Sign")},
    "Neg": unary("Neg", ("int8", "int16", "int32", "int64")),
    "Not": unary("Not", BOOL),
    "Relu": unary("Relu", ("int8", "int32")),
    "Clip": Case("(T[] x, T low, T high) => (T[] y) { y = Clip(x, low, high) }", NO_16, limits),
    "Where": Case(
        "(bool[] c, T[] x, T[] z) => (T[] y) { y = Where(c, x, z) }",
        ("int8", "uint8", "int32", "uint32", "int64"),
        choice,
    ),
    **{f"Cast to {to}": conversion(to) for to in (*ALL, "bool")},
    "CastLike": binary("CastLike", ALL),
    # Sums over at most 4 ** 3 of them stay in int32, or below 2^53, which onnxruntime holds.
    **{
        f"{op}, int{size}": reduction(op, [f"int{size}"], bits // factors)
        for op, factors in (("ReduceSum", 1), ("ReduceMean", 1), ("ReduceSumSquare", 2))
        for size, bits in ((32, 25), (64, 47))
    },
    "ReduceL1": reduction("ReduceL1", WIDE, 25),
    "ReduceProd": reduction("ReduceProd", WIDE, 1),
    **{op: reduction(op, (*ORDERED, "bool")) for op in ("ReduceMax", "ReduceMin")},
    **{f"{op}, {last}": extremum(op, last) for op in ("ArgMax", "ArgMin") for last in (0, 1)},
    **{f"CumSum, {how}": cumulative(how) for how in ("reverse=0", "reverse=1", "exclusive=1")},
    **{f"TopK, {largest}": top(largest) for largest in (0, 1)},
}
ELSEWHERE = {
    "BitCast": "opset 26, newer than onnxruntime: the cases of the specification",
    "Ceil": "of floating-point numbers: the cases of the specification",
    "CumProd": "as BitCast",
    "Floor": "as Ceil",
    "Round": "as Ceil",
}


@functools.lru_cache(maxsize=16)
def side_by_side(graph: str) -> SideBySide:
    header = '<ir_version: 10, opset_import: ["" : 21]> g '
    return SideBySide(onnx.parser.parse_model(header + graph))


@pytest.mark.parametrize("name", CASES)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_an_operator_gives_the_integers_of_onnxruntime(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    dtype = data.draw(st.sampled_from(case.types))
    feeds = data.draw(st.composite(case.feeds)(dtype))
    assert side_by_side(re.sub(r"\bT\b", dtype, case.graph)).run(feeds) == []


def test_no_operator_is_left_out() -> None:
    named = {word for case in CASES.values() for word in re.findall(r"[A-Z]\w+", case.graph)}
    known = {**arithmetic.OPS, **cast.OPS, **logic.OPS, **reduce.OPS}
    assert known.keys() - named == ELSEWHERE.keys()


def result(body: str, signature: str = "int64[] x, int64[] z", **feeds: Any) -> Any:
    text = f'<ir_version: 10, opset_import: ["" : 28]> g ({signature}) => (int64[] y) {{ {body} }}'
    given = {name: np.array(values, np.int64) for name, values in feeds.items()}
    return Interpreter(onnx.parser.parse_model(text)).run(given)["y"].tolist()


LOWEST = -(2**63)


@pytest.mark.parametrize(
    ("body", "x", "z", "reason"),
    [
        ("y = Div(x, z)", 5, [1, 0], "integer division by zero"),
        ("y = Mod(x, z)", 5, 0, "integer division by zero"),
        ("y = Div(x, z)", LOWEST, -1, "-9223372036854775808 / -1 leaves int64"),
        ("y = Mod(x, z)", LOWEST, -1, "leaves int64"),
        ("y = Pow(x, z)", 2, 63, "a power leaves int64"),
        ("y = Pow(x, z)", 0, -1, "a power leaves int64"),
        ("y = ReduceSum(x, z)", [2**53, 1], [0], "a sum or product of magnitude 2.53 or more"),
        ("y = ReduceSum(x, z)", [2**52, -(2**52)], [0], "which onnxruntime rounds to float64"),
        ("y = ReduceProd(x, z)", [2**52, 2, 0], [0], "which onnxruntime rounds to float64"),
    ],
)
def test_where_onnxruntime_has_no_result_there_is_none(
    body: str, x: Any, z: Any, reason: str
) -> None:
    with pytest.raises(
        IntqError, match=rf"node 'here' \(\w+\) failed on inputs of shapes .*{reason}"
    ):
        result(body.replace("y =", "[here] y ="), x=x, z=z)


def test_a_sum_leaves_its_type() -> None:
    body = "c = Cast<to=6>(x) s = ReduceSum(c, z) y = Cast<to=7>(s)"
    assert result(body, x=[2**31 - 1, 0], z=[0]) == [2**31 - 1]
    with pytest.raises(IntqError, match=r"a result of 2147483648 \.\. 2147483648 leaves int32"):
        result(body, x=[2**31 - 1, 1], z=[0])


def test_powers_are_exact() -> None:
    assert result("y = Pow(x, z)", x=[3, -2, -1, 7], z=[39, 63, -5, -1]) == [3**39, LOWEST, -1, 0]


def test_signed_shifts_keep_the_sign() -> None:
    body = 'y = BitShift<direction="RIGHT">(x, z)'
    assert result(body, x=[-8, -8, 8, -8], z=[1, 64, 99, -1]) == [-4, -1, 0, -1]
    body = 'y = BitShift<direction="LEFT">(x, z)'
    assert result(body, x=[-8, -8, 3, 3], z=[1, 64, 63, -1]) == [-16, 0, LOWEST, 0]


@pytest.mark.parametrize("operator", ["Pow", "Mod", "ReduceSum"])
def test_floats_are_refused(operator: str) -> None:
    second = "z" if operator == "ReduceSum" else "b"
    body = f"a = Cast<to=1>(x) b = Cast<to=1>(z) r = {operator}(a, {second}) y = Cast<to=7>(r)"
    with pytest.raises(IntqError, match=f"{operator}.* failed .* float32 .*; expected integers"):
        result(body, x=[1, 2], z=[0])


@pytest.mark.parametrize(
    ("element", "operator", "want"),
    [
        ("int8", "ReduceMax", -128),
        ("uint8", "ReduceMin", 255),
        ("bool", "ReduceMax", False),
        ("bool", "ReduceMin", True),
        ("float", "ReduceMin", np.inf),
        ("int64", "ReduceSum", 0),
        ("int64", "ReduceProd", 1),
    ],
)
def test_over_nothing_the_neutral_element_remains(element: str, operator: str, want: Any) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 20]> g ({element}[n] x) => ({element}[] y)
        {{ y = {operator}<keepdims=0>(x) }}"""
    dtype = {"float": "float32"}.get(element, element)
    found = Interpreter(onnx.parser.parse_model(text)).run({"x": np.zeros(0, dtype)})["y"]
    assert (found.dtype, found.shape, found.tolist()) == (np.dtype(dtype), (), want)
