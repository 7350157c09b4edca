from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.integer_only import prove
from onnx_intq.kernels.softmax import log_softmax, softmax
from onnx_intq.lowering import GRIDS
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

IntegerizeSoftmax: Any = load("integerize_softmax")
law = settings(max_examples=60, deadline=None)
Axis = tuple[str, int]
AXES: list[Axis] = [("", -1), ("axis = 2", -1), ("axis = -2", -2), ("axis = 0", -3)]
"""What the file says, and the axis from the end of [5, n, 29]."""


def real_log_softmax(x: Any, axis: int = -1) -> Any:
    below = x - x.max(axis=axis, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=axis, keepdims=True))


@st.composite
def grids(draw: st.DrawFn, low: float = -1, high: float = 5.7) -> Any:
    dtype = draw(st.sampled_from(sorted(GRIDS)))
    grid = GRIDS[dtype]
    scale = 2.0 ** draw(st.floats(low, high)) / (grid.high - grid.low)
    return dtype, float(np.float32(scale)), draw(st.integers(grid.low, grid.high))


@law
@given(
    op=st.sampled_from(["Softmax", "LogSoftmax"]),
    axis=st.sampled_from(AXES),
    x=grids(),
    y=grids(-3, 4),
    mode=st.sampled_from(["poly", "paper", "lut"]),
)
def test_every_integer_is_that_of_the_kernel(
    place: Any, op: str, axis: Axis, x: Any, y: Any, mode: Any
) -> None:
    text, from_the_end = axis
    model = place.graph(
        f"c = {op}<{text}>(a)" if text else f"c = {op}(a)", y, x, shapes=("5, n, 29",)
    )
    assert place.lower(IntegerizeSoftmax(mode=mode), model) == []
    q = place.integers(x[0], (5, 7, 29))
    wide = GRIDS[x[0]].bits == 16, GRIDS[y[0]].bits == 16
    mode = "poly" if mode == "lut" and wide[0] else mode
    if op == "Softmax":
        found = softmax(q.astype(np.int64), x[1], from_the_end, mode, 16 if wide[1] else 15)
    else:
        found = log_softmax(q.astype(np.int64), x[1], from_the_end, mode)
    np.testing.assert_array_equal(place.outputs(model, q), place.requantized(*found, y))


@pytest.mark.parametrize("mode", ["poly", "lut"])
@pytest.mark.parametrize("x", [("int8", 0.1, 7), ("uint16", 20 / 65535, 41000)])
@pytest.mark.parametrize("y", [("uint8", 1 / 255, 0), ("uint16", 1 / 65535, 0)])
def test_probabilities_are_near_the_real_ones(place: Any, mode: str, x: Any, y: Any) -> None:
    model = place.graph("c = Softmax(a)", y, x, shapes=("n, 250",))
    assert place.lower(IntegerizeSoftmax(mode=mode), model) == []
    random = np.random.default_rng(0)
    q = np.clip(np.rint(random.normal(0, 2.5, (40, 250)) / x[1]) + x[2], *_ends(x)).astype(x[0])
    real = np.exp(real_log_softmax(place.reals(q, x)))
    off = np.abs(place.reals(place.outputs(model, q), y) - real)
    assert off.max() <= (1.3e-3 if mode == "poly" or x[0] == "uint16" else 1e-4) + y[1] / 2


def _ends(x: Any) -> tuple[int, int]:
    return GRIDS[x[0]].low, GRIDS[x[0]].high


def test_the_end_of_a_recognizer_keeps_the_order_of_all_logits(place: Any) -> None:
    """29 letters, 8-bit logits, 16-bit logarithms: greedy decoding cannot change.

    Every pair of logits meets in some row, next to the same and to other neighbours.
    """
    for x in [("int8", 0.17, 31), ("uint8", 0.05, 200)]:
        y = ("int16", 60 / 65535, 32767)
        model = place.graph("c = LogSoftmax(a)", y, x, shapes=("n, 29",))
        assert place.lower(IntegerizeSoftmax(), model) == []
        low, high = _ends(x)
        pairs = np.stack(np.meshgrid(*[np.arange(low, high + 1)] * 2), axis=-1).reshape(-1, 2)
        random = np.random.default_rng(0)
        others = random.integers(low, high + 1, (len(pairs), 27))
        others = np.where(
            random.integers(0, 2, (len(pairs), 1)), others, pairs.min(1, keepdims=True)
        )
        q = np.concatenate([pairs, others], axis=1).astype(x[0])
        found = place.outputs(model, q)
        order = np.argsort(q.astype(int), axis=1, kind="stable")
        steps = np.diff(np.take_along_axis(q.astype(int), order, 1), axis=1)
        moved = np.diff(np.take_along_axis(found, order, 1), axis=1)
        assert (moved[steps == 0] == 0).all()
        assert (moved[steps > 0] > 0).all()  # no logit is so low that 60 nats do not hold it
        np.testing.assert_array_equal(found.argmax(1), q.argmax(1))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_recognizers_tail_is_lowered(quantized: bool) -> None:
    """Conv -> Transpose -> LogSoftmax as QuartzNet ends, after all passes: greedy equality."""
    text = """<ir_version: 10, opset_import: ["" : 17]>
        g (float[1, 16, t] x) => (float[1, t, 29] y) {
            c = Conv(x, w, b)
            s = Transpose<perm = [0, 2, 1]>(c)
            y = LogSoftmax<axis = 2>(s)
        }"""
    proto, random = onnx.parser.parse_model(text), np.random.default_rng(1)
    weights = {"w": random.standard_normal((29, 16, 1)), "b": random.standard_normal(29)}
    for name, values in weights.items():
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), name)
        proto.graph.initializer.append(tensor)
    x = random.uniform(-1, 1, (1, 16, 4000)).astype(np.float32)
    ranges = {"x": (-1.0, 1.0), "c": (-10.0, 10.0), "s": (-10.0, 10.0)}
    if quantized:
        ranges["y"] = (-20.0, 0.0)
    model = graph_from_model(proto)
    ctx = Context(facts={"bn-folded", "calibrated"}, ranges=ranges)
    run(model, parse("insert_qdq, complete_qdq, quantize_weights"), ctx, [well_formed])
    qdq = model_from_graph(model)
    lower = "integerize_conv, integerize_move, integerize_softmax, integerize_boundary"
    run(model, parse(lower), ctx, [well_formed])
    assert ctx.remaining == []
    assert prove(model) == []
    both = [qdq, model_from_graph(model)]
    results = [next(iter(Session(m, threads=1).run({"x": x}).values())) for m in both]
    np.testing.assert_array_equal(*(y.argmax(-1) for y in results))
    step = float(model.outputs[0].inputs[0].inputs[1].values)
    assert np.abs(results[1] - results[0]).max() <= 2.4e-3 + step


DECLINED = [
    ("n = Neg(a) c = Softmax(n)", ("int8", 0.05, 0), "poly", "its input 'n' is not quantized"),
    ("c = Softmax(a)", ("int8", 1.0, 0), "paper", "an exponential of steps of 1; expected at most"),
    ("c = LogSoftmax(a)", ("int8", 1.0, 0), "poly", "a requantisation by"),
]


@pytest.mark.parametrize(("body", "x", "mode", "why"), DECLINED)
def test_declines_with_the_reason(place: Any, body: str, x: Any, mode: str, why: str) -> None:
    step = 2.0**-60 if why.startswith("a requantisation") else 0.05
    model, ctx = place.graph(body, ("int8", step, 0), x), Context()
    before = len(model.nodes)
    assert IntegerizeSoftmax(mode=mode).run(model, ctx) == 0
    assert ctx.remaining == ctx.skipped
    assert [found.startswith(why) for _, found in ctx.remaining] == [True]
    assert len(model.nodes) == before


@pytest.mark.parametrize("axis", [-1, 0])
def test_without_a_rank_the_axis_must_count_from_the_end(place: Any, axis: int) -> None:
    model = place.graph(f"c = Softmax<axis = {axis}>(a)", ("uint8", 1 / 255, 0), ("int8", 0.1, 0))
    ctx = Context()
    model.tensors()["a"].shape = None
    assert IntegerizeSoftmax().run(model, ctx) == (axis < 0)
    expected = "the rank of its input is unknown; expected its axis from the end"
    assert ctx.remaining == ([("Softmax_1", expected)] if axis == 0 else [])


def test_rows_are_at_most_65536_long(place: Any) -> None:
    x, y = ("int8", 0.1, 0), ("uint8", 1 / 255, 0)
    for size, reasons in ((65536, []), (65537, ["its rows have 65537 elements; expected at most"])):
        model, ctx = place.graph("c = Softmax(a)", y, x, shapes=(f"n, {size}",)), Context()
        assert IntegerizeSoftmax().run(model, ctx) == (not reasons)
        assert [why[:46] for _, why in ctx.remaining] == [why[:46] for why in reasons]
