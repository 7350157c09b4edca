from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from onnx_intq.calibrate import calibrate
from onnx_intq.graph import graph_from_model
from onnx_intq.registry import parse
from onnx_intq.stored_weights import StoredWeight, codebook, roundable
from onnx_intq.transform import Context, run

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 6, t] x) => (float[n, m, s] y) {{ {body} }}"""
CASES = [
    ("y = Conv<group = 2>(x, w)", (4, 3, 5), (2, 2, 15), 3),
    ("t = Transpose<perm = [0, 2, 1]>(x)  y = MatMul(t, w)", (6, 4), (1, 4, 6), 6),
    ("y = MatMul(w, x)", (4, 6), (1, 4, 6), 6),
]


def stored(body: str, shape: tuple[int, ...]) -> StoredWeight:
    model = onnx.parser.parse_model(TEXT.format(body=body))
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    net = graph_from_model(model)
    made = net.copy()
    x = np.random.default_rng(1).standard_normal((2, 6, 9)).astype(np.float32)
    ctx = Context({"bn-folded", "calibrated"}, reference=net)
    ctx.ranges = calibrate(net, [{"x": x}], threads=1).select()
    run(made, parse("insert_qdq, quantize_weights(bits=6, scale='minmax')"), ctx)
    (found,) = roundable(made, ctx)
    return found


@pytest.mark.parametrize(("body", "shape", "lines", "kernels"), CASES)
def test_the_stored_integers_are_the_nearest_to_the_target(
    body: str, shape: tuple[int, ...], lines: tuple[int, ...], kernels: int
) -> None:
    found = stored(body, shape)
    assert found.target.shape == lines
    assert found.kernels == kernels
    assert found.top == 31
    nearest = np.clip(np.rint(found.target), -31, 31)
    assert np.abs(found.integers - nearest).max() <= 1  # scales are aligned by up to 2 %
    assert np.mean(found.integers != nearest) < 0.05


@pytest.mark.parametrize(("body", "shape", "lines", "kernels"), CASES)
def test_what_is_stored_is_read_back(
    body: str, shape: tuple[int, ...], lines: tuple[int, ...], kernels: int
) -> None:
    found = stored(body, shape)
    wanted = np.arange(np.prod(lines)).reshape(lines).astype(np.float32) % 31
    assert found.store(wanted)
    assert np.array_equal(found.integers, wanted)
    assert found.layer.stored.values.dtype == np.int8
    assert not found.store(wanted)


def test_bounds_are_the_neighbours_of_the_target() -> None:
    found = stored("y = MatMul(w, x)", (4, 6))
    lower, upper = found.bounds(slice(1, 3))
    target = found.target[..., 1:3]
    inside = np.abs(target) <= 31
    assert (upper - lower <= 1).all()
    assert (lower <= target)[inside].all()
    levels = np.array([-20, -3, 5, 30], np.float32)
    coded = replace(found, levels=levels)
    coded.target[0, 0, 1:3] = [5, 40]
    lower, upper = coded.bounds(slice(0, 6))
    assert (lower[0, 0, 1], upper[0, 0, 1]) == (5, 5)
    assert upper[0, 0, 2] == 30
    between = (coded.target >= -20) & (coded.target <= 30)
    assert (lower <= coded.target)[between].all()
    assert (upper >= coded.target)[between].all()
    assert np.isin([lower, upper], levels).all()


def test_a_codebook_is_known_by_its_integers() -> None:
    assert codebook(np.array([-7, 3, 7], np.int8), 7) is None
    found = codebook(np.array([[3, -8], [3, 0]], np.int8), 7)
    assert found is not None
    assert found.tolist() == [-8, 0, 3]
