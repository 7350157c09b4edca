"""Models whose weights alone are integers: taken for float ones, their integers kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.codebook import CodedWeight, code
from onnx_intq.coded_weights import is_weight_only, lift, load_coded, scales_of
from onnx_intq.cost import BITS_KEY
from onnx_intq.graph import graph_from_model, load, metadata, save
from onnx_intq.registry import parse
from onnx_intq.transform import Context, run

PER_TENSOR = "r = DequantizeLinear(w, one)"
ACTIVATION = "q = QuantizeLinear(x, one, z) d = DequantizeLinear(q, one, z) y = MatMul(d, r)"
PER_CHANNEL = "r = DequantizeLinear<axis = 1>(w, s)"


def graph(body: str) -> gs.Graph:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 4] x) => (float[2, 3] y) <float[3] s = {{0.5, 1.0, 2.0}}, float one = {{0.25}},
        int8 z = {{0}}, int8 off = {{1}}, uint8 u = {{0}}> {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    w = np.random.default_rng(0).integers(-7, 8, (4, 3)).astype(np.int8)
    weights = {"w": w, "wu": w.view(np.uint8) & 7}
    for name, values in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    read = {name for node in model.graph.node for name in node.input}
    kept = [t for t in model.graph.initializer if t.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return graph_from_model(model)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (f"{PER_CHANNEL} y = MatMul(x, r)", True),
        ("r = DequantizeLinear(w, one, z) y = MatMul(x, r)", True),
        ("r = DequantizeLinear(w, one, off) y = MatMul(x, r)", False),
        ("r = DequantizeLinear(wu, one, u) y = MatMul(x, r)", False),
        (f"{PER_TENSOR} {ACTIVATION}", False),
    ],
)
def test_what_is_weight_only(body: str, wanted: bool) -> None:
    model = graph(body)
    assert is_weight_only(model) is wanted
    before = [node.op for node in model.nodes]
    assert bool(lift(model)) is wanted
    assert ([node.op for node in model.nodes] == before) is not wanted


def test_weights_are_float_and_known_by_their_readers() -> None:
    model = graph(f"{PER_CHANNEL} a = MatMul(x, r) b = Gemm(x, r) y = Add(a, b)")
    stored = model.tensors()["w"].values
    metadata(model)[BITS_KEY] = '{"w": 4}'
    names = [node.name for node in model.nodes if node.op in {"MatMul", "Gemm"}]
    found = lift(model)
    assert set(found) == {(name, 1) for name in names}
    (coded, same) = found.values()
    assert coded is same
    assert (coded.bits, coded.axis) == (4, 1)
    assert np.array_equal(coded.stored, stored)
    assert np.array_equal(model.tensors()["r"].values, coded.dequantized())
    assert BITS_KEY not in metadata(model)


def test_a_float_model_has_none(tiny: Path) -> None:
    assert load_coded(tiny)[1] == {}


def test_packed_weights_are_found(tiny: Path) -> None:
    model = load(tiny)
    text = "fold_bn, quantize_codebook(bits=3), pack_weights"
    run(model, parse(text), Context())
    save(model, tiny.with_name("c.onnx"))
    found, coded = load_coded(tiny.with_name("c.onnx"))
    assert {node.op for node in found.nodes} == {"Conv", "Relu", "Transpose", "LogSoftmax"}
    assert [each.bits for each in coded.values()] == [3, 3]


def coded(axis: int | None = 0) -> CodedWeight:
    return code(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32), axis, 4)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_scales_follow_a_folded_factor(axis: int | None) -> None:
    given = coded(axis)
    assert scales_of(given, given.dequantized()) is given.scales
    factors = np.random.default_rng(1).uniform(0.5, 2, given.scales.shape).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(2)] if axis is not None else ()
    found = scales_of(given, given.dequantized() * factors.reshape(shape))
    assert found is not None
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, given.scales * factors, rtol=1e-5)


def test_a_channel_of_zeros_keeps_its_scale() -> None:
    stored = np.array([[0, 0], [3, -1]], np.int8)
    given = CodedWeight(stored=stored, scales=np.array([0.5, 0.25], np.float32), axis=0, bits=4)
    found = scales_of(given, given.dequantized() * np.float32(2))
    assert found is not None
    assert found.tolist() == [0.5, 0.5]


def test_other_weights_have_no_scales() -> None:
    given = coded()
    real = given.dequantized()
    assert scales_of(given, real[:2]) is None
    assert scales_of(given, real * np.linspace(1, 2, 8, dtype=np.float32)) is None
    assert scales_of(given, -real) is None
