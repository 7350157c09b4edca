import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq import qdq
from onnx_intq.alignment import (
    ADDEND_DIVISOR,
    LARGEST_DIVISOR,
    SMALLEST_DIVISOR,
    SMALLEST_MULTIPLE,
    addend_scale,
    aligned,
)
from onnx_intq.feeds import read
from onnx_intq.graph import graph_from_model, load, metadata, model_from_graph
from onnx_intq.grid import common_exponent, dyadic, requantize, weighted_sum
from onnx_intq.lowering import GRIDS, GRIDS_KEY
from onnx_intq.models.export import export_named
from onnx_intq.progress import bar
from onnx_intq.quantize import quantize
from onnx_intq.recipes import pipeline
from onnx_intq.registry import parse
from onnx_intq.runtime import Session
from onnx_intq.samples import specs
from onnx_intq.source import Source, recorded_frontend
from onnx_intq.transform import Context, run

law = settings(derandomize=True, deadline=None, max_examples=200)
SPEECH = Path(__file__).parent.parent / "models" / "pretrained" / "digits" / "manifest.json"
EXACT_DIVISOR = 1 << 13
"""Up to which float32 tells all results from ties: see `onnx_intq.alignment`."""
exponents = st.floats(-9, 2)
scales = exponents.map(lambda e: np.float32(10.0**e))


def divisors(scales: np.ndarray, x_scale: float, y_scale: float) -> np.ndarray:
    """The odd d of each y_scale / (x_scale * scale) = d / 2^j but for rounding; 0 without."""
    found = [_odd(y_scale / (x_scale * float(scale))) for scale in scales]
    return np.array(found)


def _odd(ratio: float) -> float:
    for multiple in (ratio * 2.0**j for j in range(40)):
        whole = round(multiple)
        if whole >= SMALLEST_DIVISOR and whole % 2 and abs(multiple / whole - 1) <= 2.0**-23:
            return whole
    return 0


@law
@given(scales, scales, st.lists(st.floats(-3, 7), min_size=1, max_size=5), st.booleans())
def test_ratios_become_odd_over_a_power_of_two(
    x_scale: np.float32, y_scale: np.float32, decades: list[float], floored: bool
) -> None:
    ratios = 10.0 ** np.array(decades)
    before = (float(y_scale) / (float(x_scale) * ratios)).astype(np.float32)
    floor = before if floored else 0.0
    after = aligned(before, float(x_scale), float(y_scale), floor)
    assert after.dtype == np.float32
    assert after.shape == before.shape
    assert (after >= floor).all()
    found = divisors(after, float(x_scale), float(y_scale))
    ratios = float(y_scale) / (float(x_scale) * before.astype(np.float64))
    moved = np.abs(after / before.astype(np.float64) - 1)
    alive = ratios < LARGEST_DIVISOR
    assert (moved[alive] <= (1 / 64 if floored else 1 / 128)).all()
    assert (found[alive] > 0).all()
    assert (moved[~alive] == 0).all()


def test_shapes() -> None:
    for before in (np.full((), 0.01, np.float32), np.full((3, 1), 0.02, np.float32)):
        after = aligned(before, 0.1, 0.5)
        assert after.shape == before.shape
        assert after.dtype == np.float32
        assert (after != before).all()


@law
@given(scales, st.floats(-4, 1.5))
def test_addends_get_multiples_of_a_1023rd(total: np.float32, decades: float) -> None:
    before = float(total) * 10.0**decades
    after = addend_scale(before, float(total))
    assert isinstance(after, np.float32)
    if before / float(total) * ADDEND_DIVISOR < SMALLEST_MULTIPLE:
        assert after == np.float32(before)  # a tensor must not lose its resolution for a sum
        return
    steps = float(after) / float(total) * ADDEND_DIVISOR
    assert abs(steps / round(steps) - 1) <= 2.0**-24
    assert before * (1 - 2.0**-24) <= after <= before + float(total) / ADDEND_DIVISOR * (1 + 1e-6)
    assert after <= before * (17 / 16)


CONV = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[1, k, n] x) => (float[1, c, n] z) {{
        p = QuantizeLinear(x, xs, xz)
        a = DequantizeLinear(p, xs, xz)
        b = DequantizeLinear<axis = 0>(w, ws, wz)
        e = DequantizeLinear<axis = 0>(bias, bs)
        d = Conv(a, b, e)
        y = QuantizeLinear(d, ys, yz)
        z = DequantizeLinear(y, ys, yz)
    }}"""
ADD = """<ir_version: 8, opset_import: ["" : 17]>
    g ({dtype}[256, 1] p, {dtype}[1, 256] q) => ({dtype}[256, 256] y) {{
        a = DequantizeLinear(p, ps, pz)
        b = DequantizeLinear(q, qs, qz)
        d = Add(a, b)
        y = QuantizeLinear(d, ys, yz)
    }}"""


def session(text: str, dtype: str, **values: Any) -> Session:
    model = onnx.parser.parse_model(text.format(dtype=dtype))
    for name, value in values.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return Session(model, threads=1)


def inputs(sums: np.ndarray, taps: int) -> np.ndarray:
    """[1, taps, n]: with weights 1, 127, 127, ... they add up to `sums`, zero point taken off."""
    rows = [sums % 127]
    rest = sums // 127
    for _ in range(1, taps):
        rows.append(np.clip(rest, -128, 127))
        rest = rest - rows[-1]
    assert not rest.any()
    return np.stack(rows)[None]


def wrong(dtype: str, ratios: np.ndarray, seed: int, *, align: bool = True) -> int:
    """Results in which onnxruntime's fused Conv and `requantize` differ.

    Both are step functions of the accumulator: the two sides of every step tell them apart.

    Args:
        dtype: Of input and result.
        ratios: y_scale / (x_scale * weight scale), one per channel.
        seed: Of scales, zero points and biases.
        align: Whether the weights' scales are aligned.
    """
    random, grid = np.random.default_rng(seed), GRIDS[dtype]
    x_scale, y_scale = (np.float32(2.0 ** random.uniform(-12, 3)) for _ in range(2))
    ws = (float(y_scale) / (float(x_scale) * ratios)).astype(np.float32)
    if align:
        ws = aligned(ws, float(x_scale), float(y_scale))
    x_zero = 128 if dtype == "uint8" else 0
    zero_point = int(random.integers(grid.low, grid.high + 1))
    bias = random.integers(-1000, 1000, len(ws))
    levels = np.arange(grid.low - 1, grid.high + 2) + 0.5 - zero_point
    ties = np.rint(levels * float(y_scale) / (float(x_scale) * ws[:, None].astype(np.float64)))
    sums = np.unique(ties.astype(np.int64)[..., None] - bias[:, None, None] + np.arange(-2, 3))
    taps = 2 + int(np.abs(sums).max()) // (127 * 127)
    weights = np.full((len(ws), taps, 1), 127, np.int8)
    weights[:, 0] = 1
    found = session(
        CONV,
        dtype,
        xs=x_scale,
        xz=np.array(x_zero, dtype),
        w=weights,
        ws=ws,
        wz=np.zeros(len(ws), np.int8),
        bias=bias.astype(np.int32),
        bs=x_scale * ws,
        ys=y_scale,
        yz=np.array(zero_point, dtype),
    ).run({"x": x_scale * inputs(sums, taps).astype(np.float32)})["z"][0]
    found = np.rint(found / y_scale) + zero_point
    multiplier = dyadic(float(x_scale) * ws[:, None].astype(np.float64) / float(y_scale))
    limits = {"zero_point": zero_point, "low": grid.low, "high": grid.high}
    return int((found != requantize(sums, multiplier, bias=bias[:, None], **limits)).sum())


@settings(law, max_examples=100)
@given(st.integers(0, 1 << 20), st.sampled_from(["uint8", "int8"]))
def test_fused_convolutions_give_the_integers_of_the_reference(seed: int, dtype: str) -> None:
    """For divisors up to 2^13, at every step of the result."""
    ratios = 2.0 ** np.random.default_rng(seed).uniform(-3, 12.99, 16)
    assert wrong(dtype, ratios, seed) == 0


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_the_first_and_the_last_divisors(dtype: str) -> None:
    for seed in range(4):
        ratios = np.array([129, 131, 253, 255, 257, 8189, 8191]) * 2.0**-seed
        assert wrong(dtype, ratios[ratios < EXACT_DIVISOR], seed) == 0


def test_scales_that_are_not_aligned_give_other_integers() -> None:
    ratios = 2.0 ** np.random.default_rng(0).uniform(7, 13, 64)
    assert wrong("uint8", ratios, 0, align=False) > 0


def wrong_sums(dtype: str, factors: list[float], seed: int, *, align: bool = True) -> int:
    """Of all pairs, those for which onnxruntime's fused Add and `weighted_sum` differ."""
    random, grid = np.random.default_rng(seed), GRIDS[dtype]
    total = np.float32(2.0 ** random.uniform(-12, 3))
    a, b = (
        addend_scale(f * float(total), float(total)) if align else np.float32(f * total)
        for f in factors
    )
    zeros = random.integers(grid.low, grid.high + 1, 3)
    every = np.arange(grid.low, grid.high + 1)
    found = session(
        ADD,
        dtype,
        **dict(zip(("ps", "qs", "ys"), (a, b, total), strict=True)),
        **dict(zip(("pz", "qz", "yz"), zeros.astype(dtype), strict=True)),
    ).run({"p": every[:, None].astype(dtype), "q": every[None].astype(dtype)})["y"]
    whole, c = common_exponent([float(a) / float(total), float(b) / float(total)])
    terms = [every[:, None] - zeros[0], every[None] - zeros[1]]
    limits = {"zero_point": int(zeros[2]), "low": grid.low, "high": grid.high}
    return int((found != weighted_sum(terms, whole, c, **limits)).sum())


@settings(law, max_examples=200)
@given(
    st.lists(st.floats(-5.9, 2).map(lambda e: 2.0**e), min_size=2, max_size=2),
    st.integers(0, 1 << 20),
    st.sampled_from(["uint8", "int8"]),
)
def test_fused_sums_give_the_integers_of_the_reference(
    factors: list[float], seed: int, dtype: str
) -> None:
    assert wrong_sums(dtype, factors, seed) == 0


def test_addends_that_are_not_aligned_give_other_integers() -> None:
    factors = [[0.5, 0.5], [0.25, 0.75], [1.0, 0.125]]
    assert sum(wrong_sums("uint8", f, 0, align=False) for f in factors) > 0


def exposed(model: gs.Graph, names: list[str]) -> Session:
    """The model with more outputs."""
    model = graph_from_model(model_from_graph(model))
    tensors, outputs = model.tensors(), {t.name for t in model.outputs}
    model.outputs += [tensors[name] for name in names if name not in outputs]
    return Session(model_from_graph(model), threads=1)


@pytest.mark.slow
def test_the_embedded_model_computes_the_same_integers_in_both_forms(tmp_path: Path) -> None:
    """Free-running, all integer tensors, all utterances: nothing differs."""
    export_named("digits", tmp_path / "f.onnx")
    path = tmp_path / "q.onnx"
    quantize(tmp_path / "f.onnx", path, pipeline("ort"), Source(data=SPEECH), bar=bar)
    model, lowered = load(path), load(path)
    passes = parse("complete_qdq, integerize_conv, integerize_add")
    reports = run(lowered, passes, Context({"quantized"}))
    assert [(r.changes, r.remaining) for r in reports[1:]] == [(26, ()), (4, ())]
    grids = json.loads(metadata(lowered)[GRIDS_KEY])
    known = {real: (name, zero) for name, (real, _, zero) in grids.items()}
    stored = {
        q.inputs[0].name: (q.outputs[0].name, int(q.inputs[2].values))
        for q in qdq.nodes(model, qdq.QUANTIZE)
    }
    assert len(stored) >= 31
    assert stored.keys() <= known.keys()
    before = exposed(model, [name for name, _ in stored.values()])
    after = exposed(lowered, [known[real][0] for real in stored])
    for batch in read(SPEECH, frontend=recorded_frontend(model), inputs=specs(model)):
        a, b = before.run(batch), after.run(batch)
        for real, (name, zero) in stored.items():
            other, shifted = known[real]
            np.testing.assert_array_equal(
                a[name].astype(int) - zero, b[other].astype(int) - shifted, err_msg=real
            )
