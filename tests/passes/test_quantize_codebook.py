"""Weights alone are stored as integers; activations stay float."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.codebook import code
from onnx_intq.cost import BITS_KEY
from onnx_intq.graph import graph_from_model, metadata, model_from_graph
from onnx_intq.passes.quantize_codebook import QuantizeCodebook
from onnx_intq.registry import parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, PassError, run
from onnx_intq.verify import drift, random_feeds, well_formed

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2, 6, t] x) => (float[t, 1, 2, 5] y) {
        [conv] c = Conv(x, wc, bc)
        s = Transpose<perm = [2, 0, 1]>(c)
        [lstm] y, h, k = LSTM<hidden_size = 5>(s, W, R)
    }"""
SHAPES = {"wc": (8, 6, 1), "bc": (8,), "W": (1, 20, 8), "R": (1, 20, 5)}


def graph() -> gs.Graph:
    model = onnx.parser.parse_model(TEXT)
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        values = random.normal(0, 0.3, shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return graph_from_model(model)


def bits(model: gs.Graph) -> dict[str, int]:
    found: dict[str, int] = json.loads(metadata(model).get(BITS_KEY, "{}"))
    return found


def test_weights_are_stored_as_integers() -> None:
    model, before = graph(), graph()
    weights = {name: before.tensors()[name].values for name in ("wc", "W", "R")}
    first, second = run(model, parse("quantize_codebook(bits=4), " * 2), Context(), [well_formed])
    assert (first.changes, second.changes) == (3, 0)
    assert bits(model) == {"R_q": 4, "W_q": 4, "wc_q": 4}
    for name, w in weights.items():
        stored = model.tensors()[f"{name}_q"].values
        assert np.array_equal(stored, code(w, 0 if name == "wc" else 1, 4).stored)
    feeds = random_feeds(model, {"x": (2, 6, 9)})
    found = [Session(model_from_graph(m), threads=1).run(feeds) for m in (before, model)]
    assert drift(*found).sqnr > 15


def test_overrides_and_what_stays_float() -> None:
    model = graph()
    ctx = Context()
    spec = QuantizeCodebook(
        bits=3, kind="uniform", keep=("conv",), overrides=(("l*", 2), ("lstm", 8))
    )
    assert spec.run(model, ctx) == 2
    assert bits(model) == {}
    assert ctx.skipped == [("conv", "its weight is to stay float")]
    assert model.tensors()["wc"].values.dtype == np.float32


def test_a_weight_with_a_scale_per_value_stays_float() -> None:
    parsed = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 6, 4] x) => (float[1, 6, 4] y) { [unit] y = Conv<group = 6>(x, w) }""")
    w = np.ones((6, 1, 1), np.float32)
    parsed.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    ctx = Context()
    assert QuantizeCodebook(bits=5).run(graph_from_model(parsed), ctx) == 0
    assert ctx.skipped == [("unit", "its weight has too few values per scale")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (QuantizeCodebook(bits=9), "9-bit weights; expected 1..8"),
        (QuantizeCodebook(overrides=(("*", 0),)), "0-bit weights; expected 1..8"),
        (QuantizeCodebook(kind="best"), "codebook 'best'; expected one of: lloyd, mu-law, uniform"),
    ],
)
def test_bad_options(spec: QuantizeCodebook, message: str) -> None:
    with pytest.raises(PassError, match=message):
        spec.run(graph(), Context())


def test_weights_that_are_not_finite() -> None:
    model = graph()
    model.tensors()["wc"].values[0] = np.inf
    with pytest.raises(PassError, match="weight 'wc' holds NaN or infinity"):
        QuantizeCodebook().run(model, Context())
