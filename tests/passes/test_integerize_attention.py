from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.integer_only import prove
from onnx_intq.kernels.softmax import softmax_matmul
from onnx_intq.lowering import GRIDS
from onnx_intq.registry import load, parse
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

IntegerizeAttention: Any = load("integerize_attention")
law = settings(max_examples=60, deadline=None)
BODY = """s = Softmax(a) p = QuantizeLinear(s, ps, pz) w = DequantizeLinear(p, ps, pz)
    c = MatMul(w, b)"""
WEIGHTS: dict[str, Any] = {"ps": np.float32(1 / 255), "pz": np.uint8(0)}
SHAPES = ("2, m, t", "2, t, 4")
SCORES, V, Y = ("int8", 0.08, -3), ("int8", 0.02, 5), ("int8", 0.02, -1)
Parameters = tuple[str, float, int]


@st.composite
def grids(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(sorted(GRIDS))) -> Parameters:
    dtype = draw(st.sampled_from(dtypes))
    grid = GRIDS[dtype]
    scale = 2.0 ** draw(st.floats(-1, 5)) / (grid.high - grid.low)
    return dtype, float(np.float32(scale)), draw(st.integers(grid.low, grid.high))


def real_attention(scores: Any, v: Any) -> Any:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True) @ v


def inputs(place: Any, scores: Parameters, v: Parameters, frames: int = 60) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    real = random.normal(0, 1, (2, 31, frames))
    grid = GRIDS[scores[0]]
    q = np.clip(np.rint(real / scores[1]) + scores[2], grid.low, grid.high).astype(scores[0])
    grid = GRIDS[v[0]]
    return q, random.integers(grid.low, grid.high + 1, (2, frames, 4)).astype(v[0])


@law
@given(
    scores=grids(),
    v=grids(),
    y=grids(),
    direct=st.booleans(),
    mode=st.sampled_from(["poly", "paper", "lut"]),
)
def test_every_integer_is_that_of_the_kernel(
    place: Any, scores: Parameters, v: Parameters, y: Parameters, direct: bool, mode: Any
) -> None:
    """With a grid for the weights, which goes, and without."""
    body = "w = Softmax(a) c = MatMul(w, b)" if direct else BODY
    model = place.graph(body, y, scores, v, shapes=SHAPES, **({} if direct else WEIGHTS))
    assert place.lower(IntegerizeAttention(mode=mode), model) == []
    products = [n.op for n in model.nodes if n.op.startswith("MatMul")]
    assert products == ["MatMulInteger"] * (GRIDS[v[0]].bits // 8)
    q, values = inputs(place, scores, v)
    grid = GRIDS[y[0]]
    expected = softmax_matmul(
        q.astype(np.int64),
        scores[1],
        values.astype(np.int64),
        v[1] / y[1],
        v_zero_point=v[2],
        v_bits=GRIDS[v[0]].bits,
        zero_point=y[2],
        low=grid.low,
        high=grid.high,
        mode="poly" if mode == "lut" and GRIDS[scores[0]].bits == 16 else mode,
    )
    np.testing.assert_array_equal(place.outputs(model, q, values), expected)


@pytest.mark.parametrize("mode", ["poly", "lut"])
@pytest.mark.parametrize("frames", [60, 250])
def test_loses_less_than_weights_on_a_grid(place: Any, mode: str, frames: int) -> None:
    """250 probabilities of 1/250 each have one step of 1/255: 8 bits cannot tell them apart."""
    q, values = inputs(place, SCORES, V, frames)
    real = real_attention(place.reals(q, SCORES), place.reals(values, V))
    y = "int16", 2 * float(np.abs(real).max()) / 65535, 0
    models = [
        place.graph(BODY, y, SCORES, V, shapes=(f"2, m, {frames}", f"2, {frames}, 4"), **WEIGHTS)
        for _ in "ab"
    ]
    assert place.lower(IntegerizeAttention(mode=mode), models[0]) == []
    ctx = Context(facts={"complete"})
    run(
        models[1],
        parse(f"integerize_softmax(mode={mode!r}), integerize_matmul"),
        ctx,
        [well_formed],
    )
    assert ctx.remaining == []
    found = [place.reals(place.outputs(model, q, values), y) for model in models]
    rms = [float(np.sqrt(np.square(each - real).mean() / np.square(real).mean())) for each in found]
    assert rms[0] < 0.02
    assert rms[0] < rms[1] / 4


def test_an_activation_behind_the_product_is_its_limit(place: Any) -> None:
    q, values = inputs(place, SCORES, V)
    body = BODY.replace("c = MatMul(w, b)", "m = MatMul(w, b) c = Relu(m)")
    models = [place.graph(b, Y, SCORES, V, shapes=SHAPES, **WEIGHTS) for b in (BODY, body)]
    for model in models:
        assert place.lower(IntegerizeAttention(), model) == []
    alone, limited = (place.outputs(model, q, values) for model in models)
    np.testing.assert_array_equal(limited, np.maximum(alone, Y[2]))


SKIPPED = [
    ("Softmax<axis = 1>", SCORES, V, "its softmax does not run over the last axis"),
    ("Softmax", SCORES, ("int8", 2.0**15, 0), "an attention output by"),
]


@pytest.mark.parametrize(("softmax", "scores", "v", "why"), SKIPPED)
def test_what_it_skips_is_left_to_other_passes(
    place: Any, softmax: str, scores: Parameters, v: Parameters, why: str
) -> None:
    y = ("int8", 0.02, 0) if v[1] < 1 else ("int8", 2.0**-3, 0)
    body = BODY.replace("Softmax", softmax)
    model, ctx = place.graph(body, y, scores, v, shapes=SHAPES, **WEIGHTS), Context()
    assert IntegerizeAttention().run(model, ctx) == 0
    assert [found.startswith(why) for _, found in ctx.skipped] == [True]
    assert ctx.remaining == []
    ctx.facts.add("complete")
    run(model, parse("integerize_softmax"), ctx, [well_formed])
    assert ctx.remaining == []


def test_a_bias_is_left_to_other_passes(place: Any) -> None:
    body = BODY.replace("c = MatMul(w, b)", "m = MatMul(w, b) c = Add(m, bias)")
    bias = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    shapes = ("2, m, 60", "2, 60, 4")
    model = place.graph(body, Y, SCORES, V, shapes=shapes, bias=bias, **WEIGHTS)
    passes = "integerize_attention, integerize_softmax, integerize_matmul"
    ctx = Context(facts={"complete"})
    first, *_ = run(model, parse(passes), ctx, [well_formed])
    assert first.changes == 0
    assert [why for _, why in first.skipped] == ["a bias is added"]
    assert ctx.remaining == []
    assert prove(model) == []


@pytest.mark.parametrize(
    "body",
    [
        BODY + " d = Add(c, s)",  # the weights are read
        BODY.replace("MatMul(w, b)", "MatMul(b, w)"),  # on the right
        BODY.replace("Softmax(a)", "Sigmoid(a)"),
        "w = Identity(a) c = MatMul(w, b)",
    ],
)
def test_other_products_are_no_attention(place: Any, body: str) -> None:
    constants = WEIGHTS if "ps" in body else {}
    shapes = ("2, 4, 4", "2, 4, 4")
    model, ctx = place.graph(body, Y, SCORES, V, shapes=shapes, **constants), Context()
    assert IntegerizeAttention().run(model, ctx) == 0
    assert ctx.skipped == []
