"""Weights coded by int8 centroids: what is stored, and where it stands in a graph."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.codebook import KINDS, CodedWeight, code, insert_coded, record_bits
from onnx_intq.cost import BITS_KEY
from onnx_intq.graph import graph_from_model, metadata, model_from_graph
from onnx_intq.runtime import Session
from onnx_intq.transform import IntqError

SHAPES = st.sampled_from([((6, 4, 3), 0), ((5, 7), 1), ((1, 8, 4), 1), ((40,), None), ((4, 9), -1)])


@given(st.integers(0, 99), SHAPES, st.integers(1, 8), st.sampled_from(KINDS), st.booleans())
def test_every_kind_stores_few_integers_and_their_scales(
    seed: int, place: tuple[tuple[int, ...], int | None], bits: int, kind: str, weighted: bool
) -> None:
    shape, axis = place
    random = np.random.default_rng(seed)
    w = random.normal(size=shape).astype(np.float32)
    importance = random.uniform(0.1, 1, shape[-1]).astype(np.float32) if weighted else None
    coded = code(w, axis, bits, kind, importance)
    assert coded.stored.dtype == np.int8
    assert coded.stored.shape == shape
    assert coded.stored.flags.c_contiguous
    assert len(coded.centroids) <= 1 << bits
    assert coded.scales.shape == (() if axis is None else (shape[axis],))
    assert (coded.axis, coded.bits) == (axis, bits)
    real = coded.dequantized()
    assert real.dtype == np.float32
    assert np.square(real - w).sum() < np.square(w).sum()


def test_eight_bits_are_uniform() -> None:
    w = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    codes = [code(w, 0, 8, kind) for kind in KINDS]
    assert all(np.array_equal(each.stored, codes[0].stored) for each in codes)


@pytest.mark.parametrize(
    ("bits", "kind", "value", "message"),
    [
        (0, "lloyd", 1.0, "0-bit weights; expected 1..8"),
        (9, "lloyd", 1.0, "9-bit weights; expected 1..8"),
        (4, "best", 1.0, "codebook 'best'; expected one of: lloyd, mu-law, uniform"),
        (4, "lloyd", np.nan, "NaN or infinity; expected finite values"),
    ],
)
def test_bad_arguments(bits: int, kind: str, value: float, message: str) -> None:
    with pytest.raises(IntqError, match=message):
        code(np.full((2, 3), value, np.float32), 0, bits, kind)


@pytest.mark.parametrize(("axis", "bits"), [(1, 3), (None, 8)])
def test_all_readers_read_the_coded_weight(axis: int | None, bits: int) -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 4] x) => (float[2, 3] y, float[2, 3] z) {
            y = MatMul(x, w)
            z = Gemm(x, w)
        }""")
    w = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    graph = graph_from_model(model)
    coded = code(w, axis, bits)
    insert_coded(graph, graph.tensors()["w"], coded)
    assert [n.op for n in graph.nodes] == ["DequantizeLinear", "MatMul", "Gemm"]
    recorded = json.loads(metadata(graph).get(BITS_KEY, "{}"))
    assert recorded == ({"w_q": 3} if bits == 3 else {})
    x = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    found = Session(model_from_graph(graph), threads=1).run({"x": x})
    for name in ("y", "z"):
        np.testing.assert_allclose(found[name], x @ coded.dequantized(), rtol=1e-4, atol=1e-5)
    record_bits(graph, {"other": 2})
    assert json.loads(metadata(graph)[BITS_KEY]) == recorded | {"other": 2}


def test_centroids_are_the_distinct_integers() -> None:
    stored = np.array([[3, -1], [3, 7]], np.int8)
    coded = CodedWeight(stored=stored, scales=np.array([0.5, 2], np.float32), axis=0, bits=2)
    assert coded.centroids.tolist() == [-1, 3, 7]
    assert coded.dequantized().tolist() == [[1.5, -0.5], [6, 14]]
