"""`place_values.py`: factors of 16 bits as bytes, and sums of the bytes' products."""

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import Names, model_from_graph
from onnx_intq.grid import dyadic, requantize
from onnx_intq.interpreter import differences
from onnx_intq.intervals import bounds
from onnx_intq.lowering import GRIDS, CannotLowerError, Operand
from onnx_intq.place_values import digits, total
from onnx_intq.registry import parse
from onnx_intq.runtime import Session
from onnx_intq.trace import Builder
from onnx_intq.transform import Context, run

law = settings(max_examples=40, deadline=None)
WIDE = ["int16", "uint16"]


def operand(dtype: str, zero_point: int, shape: Any = ("n",)) -> tuple[Operand, Builder]:
    tensor = gs.Variable("x", np.dtype(dtype), shape)
    graph = gs.Graph(inputs=[tensor], opset=21)
    x = Operand(tensor=tensor, scale=0.5, zero_point=zero_point, grid=GRIDS[dtype])
    return x, Builder(graph, Names(graph), {})


@law
@given(st.sampled_from(WIDE), st.booleans(), st.data())
def test_bytes_with_their_zero_points_are_the_integer_less_its_own(
    dtype: str, signed: bool, data: st.DataObject
) -> None:
    """For all 65,536 integers; and the bounds of all nodes are proven."""
    grid = GRIDS[dtype]
    zero_point = data.draw(st.integers(grid.low, grid.high))
    x, builder = operand(dtype, zero_point)
    high, low = digits(x, builder, signed=signed)
    assert (high.place, low.place) == (256, 1)
    assert (high.operand.scale, low.operand.scale) == (128.0, 0.5)
    builder.graph.outputs = [high.operand.tensor, low.operand.tensor]
    every = np.arange(grid.low, grid.high + 1)
    feeds = {"x": every.astype(dtype)}
    found = Session(model_from_graph(builder.graph), threads=1).run(feeds).values()
    centred = [
        q.astype(np.int64) - d.operand.zero_point for q, d in zip(found, (high, low), strict=True)
    ]
    np.testing.assert_array_equal(256 * centred[0] + centred[1], every - zero_point)
    for digit in (high, low):
        assert digit.operand.tensor.dtype == digit.operand.grid.dtype
        assert digit.operand.grid == GRIDS["int8" if signed else "uint8"]
        assert digit.operand.grid.low <= digit.operand.zero_point <= digit.operand.grid.high
    assert bounds(builder.graph).risks == ()


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_8_bits_are_their_only_byte(dtype: str) -> None:
    x, builder = operand(dtype, 3)
    (digit,) = digits(x, builder)
    assert digit.operand is x
    assert digit.place == 1
    assert builder.graph.nodes == []


@pytest.mark.parametrize(("reach", "dtype"), [(1 << 21, np.int32), (1 << 30, np.int64)])
def test_sums_are_int32_where_they_fit(reach: int, dtype: Any) -> None:
    graph = gs.Graph(inputs=[gs.Variable(n, np.int32, (3,)) for n in "ab"], opset=21)
    builder = Builder(graph, Names(graph), {})
    a, b = (builder.value(t, -reach, reach) for t in graph.inputs)
    found = total([(256, a), (1, b)], -256 * reach, 256 * reach)
    assert found.dtype == dtype
    assert (found.low, found.high) == (-256 * reach, 256 * reach)
    graph.outputs = [found.tensor]
    feeds = dict(
        zip("ab", np.array([[-reach, reach, 7], [reach, -reach, -9]], np.int32), strict=True)
    )
    (sums,) = Session(model_from_graph(graph), threads=1).run(feeds).values()
    assert sums.tolist() == [-255 * reach, 255 * reach, 7 * 256 - 9]
    single = total([(1, a)], -5, 5)
    assert single.tensor is a.tensor
    assert (single.low, single.high) == (-5, 5)


@pytest.mark.parametrize(("low", "high"), [(-(1 << 31), 0), (0, 1 << 31)])
def test_sums_of_one_byte_must_fit_int32(low: int, high: int) -> None:
    graph = gs.Graph(inputs=[gs.Variable("a", np.int32, (3,))], opset=21)
    value = Builder(graph, Names(graph), {}).value(graph.inputs[0], low, high)
    with pytest.raises(CannotLowerError, match="an accumulator exceeds 32 bits; expected fewer"):
        total([(1, value)], low, high)


MATMUL, CONV = "c = MatMul(a, b)", "c = Conv<pads = [1, 1]>(a, b)"
LAYERS = {
    MATMUL: ("4, {k}", ("{k}", "3")),
    CONV: ("1, {k}, 5", ("3", "{k}", "3")),
}
"""Body -> shapes of the input and the weight; `k` are summed, in the convolution three times."""


@pytest.mark.parametrize("y", sorted(GRIDS))
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("body", "size"), [(MATMUL, 2048), (CONV, 512)])
def test_long_sums_are_exact_and_proven(
    place: Any, body: str, size: int, dtype: str, y: str
) -> None:
    """2,048 and 3 x 512 products: sums of over 32 bits, the largest there can be among them."""
    text, dims = LAYERS[body]
    random, grid = np.random.default_rng(0), GRIDS[dtype]
    shape = [int(d.format(k=size)) for d in dims]
    w = random.integers(-128, 128, shape).astype(np.int8)
    w[(..., 0) if "MatMul" in body else 0] = -128
    zero_point = grid.low + 258
    model = place.graph(
        "b = DequantizeLinear(w, ws, wz) " + body,
        (y, 2.0 ** (12 if GRIDS[y].bits == 8 else 4), GRIDS[y].low + 99),
        (dtype, 2.0**-6, zero_point),
        shapes=(text.format(k=size),),
        w=w,
        ws=np.float32(2.0**-7 / 1.1),
        wz=np.int8(0),
    )
    ctx = Context(facts={"complete"})
    cpu = "any" if dtype == "int16" else "vnni"
    run(model, parse(f"integerize_conv(cpu={cpu!r}), integerize_matmul(cpu={cpu!r})"), ctx, [])
    assert ctx.remaining == []
    assert bounds(model).risks == ()
    x = random.integers(grid.low, grid.high + 1, [int(d) for d in text.format(k=size).split(", ")])
    x[0] = np.where(random.random(x[0].shape) < 0.9, grid.high, x[0])
    centred, weights = x - zero_point, w.astype(np.int64)
    if "Conv" in body:
        padded = np.pad(centred, ((0, 0), (0, 0), (1, 1)))
        acc = sum(
            np.einsum("oc,nct->not", weights[..., i], padded[..., i : i + 5]) for i in (0, 1, 2)
        )
    else:
        acc = centred @ weights
    assert np.abs(acc).max() > 1 << 31
    result, *_ = Session(model_from_graph(model), threads=1).run({"x0": x.astype(dtype)}).values()
    real = float(np.float32(2.0**-7 / 1.1)) * 2.0**-6 / 2.0 ** (12 if GRIDS[y].bits == 8 else 4)
    ends = {"zero_point": GRIDS[y].low + 99, "low": GRIDS[y].low, "high": GRIDS[y].high}
    longest = int(max(grid.high - zero_point, zero_point - grid.low))
    reach = longest * int(np.abs(weights).sum(axis=0 if "MatMul" in body else (1, 2)).max())
    multiplier = dyadic(real, 62 - GRIDS[y].bits, 62 - reach.bit_length())
    np.testing.assert_array_equal(result, requantize(acc, multiplier, **ends))
    assert differences(model_from_graph(model), {"x0": x.astype(dtype)}) == []


def test_products_of_two_factors_of_16_bits_are_four(place: Any) -> None:
    """Up to 40 bits of sums; beyond, as along an axis of unknown length, it says so."""
    q, k = ("int16", 2.0**-12, -77), ("uint16", 2.0**-12, 40000)
    models = {
        size: place.graph(
            "c = MatMul(a, b)",
            ("int16", 2.0**-8, 5),
            q,
            k,
            shapes=(f"2, t, {size}", f"2, {size}, t"),
        )
        for size in ("64", "d")
    }
    spec = parse("integerize_matmul")[0]
    assert place.lower(spec, models["64"]) == []
    assert [n.op for n in models["64"].nodes].count("MatMulInteger") == 4
    assert bounds(models["64"]).risks == ()
    x, w = place.integers("int16", (2, 9, 64)), place.integers("uint16", (2, 64, 9), 1)
    acc = (x.astype(np.int64) + 77) @ (w.astype(np.int64) - 40000)
    # Bytes alone are bounded a little wider than their sum, but by no whole bit.
    reach = 64 * (32768 + 77) * 40000
    expected = place.requantized(acc, 2.0**-24, ("int16", 2.0**-8, 5), reach)
    np.testing.assert_array_equal(place.outputs(models["64"], x, w), expected)
    (why,) = place.lower(spec, models["d"])
    assert why.startswith("an accumulator exceeds ")
