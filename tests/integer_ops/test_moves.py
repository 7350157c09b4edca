"""Operators that make, move, pick and place elements do what onnxruntime does, for every type."""

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

from onnx_intq.integer_ops import indexing, layout
from onnx_intq.interpreter import Interpreter, SideBySide
from onnx_intq.transform import IntqError

Feeds = dict[str, npt.NDArray[Any]]
Draw = st.DrawFn

ALL = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool")
NO_16 = ("int8", "uint8", "int32", "uint32", "int64", "uint64", "bool")
BYTES = ("int8", "uint8")
WIDE = ("int32", "int64")


def array(draw: Draw, dtype: str, *shape: int) -> npt.NDArray[Any]:
    return draw(hnp.arrays(np.dtype(dtype), shape))


def integers(*values: int) -> npt.NDArray[Any]:
    return np.array(values, np.int64)


def sizes(draw: Draw, rank: int) -> tuple[int, ...]:
    return draw(hnp.array_shapes(min_dims=rank, max_dims=rank, max_side=4))


def matrix(draw: Draw, dtype: str) -> Feeds:
    return {"x": array(draw, dtype, *sizes(draw, 2))}


def sides(draw: Draw, dtype: str) -> Feeds:
    x = array(draw, dtype, *sizes(draw, 2))
    return {"x": x, "i": integers(*(draw(st.integers(0, n - 1)) for n in (*x.shape, *x.shape)))}


def crops(draw: Draw, dtype: str) -> Feeds:
    return {"x": array(draw, dtype, 6), "i": integers(draw(st.integers(-3, 3)), -2)}


def cuts(draw: Draw, dtype: str) -> Feeds:
    step, place = st.integers(-3, 3).filter(bool), st.integers(-6, 6)
    steps = [draw(step), draw(step)]
    # The one sign that means "to the end"; with the other onnxruntime does as it likes.
    ends = [draw(place | st.just(-(2**63) if s < 0 else 2**63 - 1)) for s in steps]
    axes = [n - 2 * draw(st.booleans()) for n in draw(st.permutations([0, 1]))]
    return matrix(draw, dtype) | {
        "starts": integers(draw(place), draw(place)),
        "ends": integers(*ends),
        "axes": integers(*axes),
        "steps": integers(*steps),
    }


def picks(draw: Draw, dtype: str) -> Feeds:
    x = array(draw, dtype, *sizes(draw, 2))
    places = hnp.arrays(np.int64, sizes(draw, 2), elements=st.integers(-len(x), len(x) - 1))
    return {"x": x, "i": draw(places)}


def rows(draw: Draw, dtype: str) -> Feeds:
    """Some rows of a matrix, each once, and what to put there."""
    x = array(draw, dtype, *sizes(draw, 2))
    chosen = draw(st.lists(st.integers(0, len(x) - 1), min_size=1, unique=True))
    places = integers(*chosen)[:, None] - len(x) * draw(st.booleans())
    return {"x": x, "i": places, "u": array(draw, dtype, len(chosen), x.shape[1])}


def same_row(draw: Draw, dtype: str) -> Feeds:
    feeds = rows(draw, dtype)
    return feeds | {"i": np.zeros_like(feeds["i"])}


def columns(draw: Draw, dtype: str) -> Feeds:
    feeds = rows(draw, dtype)
    return feeds | {"i": np.broadcast_to(feeds["i"], feeds["u"].shape).copy()}


def picked(make: Callable[[Draw, str], Feeds]) -> Callable[[Draw, str], Feeds]:
    def feeds(draw: Draw, dtype: str) -> Feeds:
        return {name: values for name, values in make(draw, dtype).items() if name != "u"}

    return feeds


def spans(draw: Draw, dtype: str) -> Feeds:
    place, step = st.integers(-50, 50), st.integers(-7, 7).filter(bool)
    drawn = zip("abc", (draw(place), draw(place), draw(step)), strict=True)
    return {name: np.array(value, dtype) for name, value in drawn}


def classes(draw: Draw, dtype: str) -> Feeds:
    i = draw(hnp.arrays(np.int64, sizes(draw, 2), elements=st.integers(-5, 5)))
    return {"i": i, "d": np.array(4), "v": array(draw, dtype, 2)}


def lengths(draw: Draw, dtype: str) -> Feeds:
    counts = integers(draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    return {"x": array(draw, dtype, 3, 2, 2), "i": counts}


def mask(draw: Draw, dtype: str) -> Feeds:
    return {"x": array(draw, dtype, 2, 3), "c": array(draw, "bool", 2)}


def fixed(*shape: int) -> Callable[[Draw, str], Feeds]:
    return lambda draw, dtype: {"x": array(draw, dtype, *shape)}


@dataclass(frozen=True)
class Case:
    """A graph over a type T, what to feed, and the types onnxruntime has it for."""

    graph: str
    feeds: Callable[[Draw, str], Feeds]
    types: Sequence[str] = ALL


def unary(
    operator: str,
    types: Sequence[str] = ALL,
    feeds: Callable[[Draw, str], Feeds] = matrix,
    result: str = "T",
) -> Case:
    return Case(f"(T[] x) => ({result}[] y) {{ y = {operator}(x) }}", feeds, types)


def indexed(operator: str, feeds: Callable[[Draw, str], Feeds], types: Sequence[str] = ALL) -> Case:
    return Case(f"(T[] x, int64[] i) => (T[] y) {{ y = {operator}(x, i) }}", feeds, types)


def placing(operator: str, feeds: Callable[[Draw, str], Feeds], reduction: str = "none") -> Case:
    body = f'y = {operator}<reduction="{reduction}">(x, i, u)'
    graph = f"(T[] x, int64[] i, T[] u) => (T[] y) {{ {body} }}"
    return Case(graph, feeds, ALL if reduction == "none" else ALL[:-1])


CASES: Mapping[str, Case] = {
    **{
        f"Pad, {mode}": indexed(f'Pad<mode="{mode}">', sides, NO_16)
        for mode in ("constant", "edge", "reflect", "wrap")
    },
    "Pad, cropping": indexed("Pad", crops, NO_16),
    "Pad, axes": Case(
        "(T[] x, T v) => (T[] y) { p = Constant<value_ints=[1,2]>() a = Constant<value_ints=[-1]>()"
        "y = Pad(x, p, v, a) }",
        lambda draw, t: matrix(draw, t) | {"v": array(draw, t)},
        NO_16,
    ),
    "Slice": Case(
        "(T[] x, int64[n] starts, int64[n] ends, int64[n] axes, int64[n] steps) => (T[] y)"
        "{ y = Slice(x, starts, ends, axes, steps) }",
        cuts,
    ),
    "Gather": indexed("Gather", picks),
    "GatherND": indexed("GatherND", picked(rows)),
    "GatherND, batched": indexed(
        "GatherND<batch_dims=1>",
        lambda draw, t: {"x": array(draw, t, 2, 3, 2), "i": integers(0, 2)[:, None]},
    ),
    "GatherElements": indexed("GatherElements", picked(columns)),
    "ScatterND": placing("ScatterND", rows),
    "ScatterElements": placing("ScatterElements", columns),
    **{
        f"ScatterND, {how}": placing("ScatterND", same_row, how)
        for how in ("add", "mul", "max", "min")
    },
    "ReverseSequence": indexed("ReverseSequence", lengths),
    **{
        f"DepthToSpace, {mode}": unary(
            f'DepthToSpace<blocksize=2, mode="{mode}">', BYTES, fixed(1, 8, 2, 3)
        )
        for mode in ("DCR", "CRD")
    },
    "SpaceToDepth": unary("SpaceToDepth<blocksize=2>", BYTES, fixed(1, 2, 4, 6)),
    "Range": Case(
        "(T a, T b, T c) => (T[] y) { y = Range(a, b, c) }", spans, ("int16", "int32", "int64")
    ),
    "OneHot": Case(
        "(int64[] i, int64 d, T[2] v) => (T[] y) { y = OneHot(i, d, v) }", classes, ("int64",)
    ),
    "Trilu": unary("Trilu<upper=0>", WIDE),
    "Trilu, above": Case(
        "(T[] x) => (T[] y) { k = Constant<value_int=1>() y = Trilu(x, k) }", matrix, WIDE
    ),
    "NonZero": unary("NonZero", ("uint8", "int32", "int64", "bool"), result="int64"),
    "Transpose": unary("Transpose"),
    "Transpose, perm": unary("Transpose<perm=[1,2,0]>", feeds=fixed(2, 3, 4)),
    "Flatten": unary("Flatten<axis=-1>", feeds=fixed(2, 3, 4)),
    "shapes": Case(
        """(T[] x) => (int64[] s, int64 n, T[] y, T[] t, T[] u, T[] v) {
            s = Shape(x) n = Size(x) e = Expand(x, s) y = Reshape(e, s)
            z = Constant<value_ints=[0]>() q = Unsqueeze(x, z) t = Squeeze(q, z) v = Squeeze(x)
            u = Concat<axis=0>(x, x)
        }""",
        matrix,
    ),
    "Split": Case(
        "(T[5,a] x) => (T[] y, T[] z, T[] u) { y, z, u = Split<axis=0, num_outputs=3>(x) }",
        fixed(5, 2),
    ),
    "Split, sizes": Case(
        "(T[5,a] x) => (T[] y, T[] z) { s = Constant<value_ints=[1,4]>() y, z = Split(x, s) }",
        fixed(5, 2),
    ),
    "Tile": Case("(T[a,b] x) => (T[] y) { s = Shape(x) y = Tile(x, s) }", matrix),
    "Compress": Case(
        "(T[2,a] x, bool[2] c) => (T[] y, T[] z) {y = Compress<axis=0>(x, c) z = Compress(x, c)}",
        mask,
    ),
    "EyeLike": unary("EyeLike<k=1>", WIDE),
    "ConstantOfShape": Case(
        "(T[] x) => (int8[] y) { s = Shape(x) y = ConstantOfShape<value=int8[1] {-7}>(s) }",
        matrix,
    ),
}


@functools.lru_cache(maxsize=16)
def side_by_side(graph: str) -> SideBySide:
    header = '<ir_version: 10, opset_import: ["" : 21]> g '
    return SideBySide(onnx.parser.parse_model(header + graph))


@pytest.mark.parametrize("name", CASES)
@settings(derandomize=True, deadline=None, max_examples=40)
@given(data=st.data())
def test_an_operator_moves_as_onnxruntime_does(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    dtype = data.draw(st.sampled_from(case.types))
    feeds = data.draw(st.composite(case.feeds)(dtype))
    assert side_by_side(re.sub(r"\bT\b", dtype, case.graph)).run(feeds) == []


def test_no_operator_is_left_out() -> None:
    named = {word for case in CASES.values() for word in re.findall(r"[A-Z]\w+", case.graph)}
    assert {*indexing.OPS, *layout.OPS} - named == {"Scatter"}  # ScatterElements' old name


def test_an_index_out_of_range_is_refused() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (int8[n] x, int64[m] i) => (int8[] y)
        { [pick] y = Gather(x, i) }"""
    interpreter = Interpreter(onnx.parser.parse_model(text))
    with pytest.raises(IntqError, match=r"node 'pick' \(Gather\) .* index 2 is out of bounds"):
        interpreter.run({"x": np.zeros(2, np.int8), "i": integers(-2, 2)})
