"""Square root, LayerNorm, division, averages, tables, erf and GELU as ONNX nodes in onnxruntime."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import Names
from onnx_intq.kernels.average import average, mean
from onnx_intq.kernels.division import divide, reciprocal
from onnx_intq.kernels.erf import erf, gelu
from onnx_intq.kernels.exponential import Mode
from onnx_intq.kernels.layer_norm import LONGEST, normalize
from onnx_intq.kernels.square_root import isqrt
from onnx_intq.kernels.table import lookup, table
from onnx_intq.runtime import Session
from onnx_intq.trace import Builder, Value

law = settings(derandomize=True, deadline=None, max_examples=100)
scales = st.floats(-60, 20).map(lambda exponent: 2.0**exponent)
Bounds = tuple[int, int]
WIDE: Bounds = (-65535, 65535)
INT16: Bounds = (-32768, 32767)


def symbol(to: Builder, bounds: Bounds, shape: tuple[int, ...]) -> Value:
    """A new int64 input with integers in `bounds`."""
    inputs = to.graph.inputs
    inputs.append(gs.Variable(f"input{len(inputs)}", np.int64, shape))
    return to.value(inputs[-1], *bounds)


def builder() -> Builder:
    graph = gs.Graph(opset=21)
    return Builder(graph, Names(graph), {})


def same_in_onnxruntime(kernel: Callable[..., Any], *inputs: tuple[np.ndarray, Bounds]) -> Value:
    """The graph gives the integers of the arrays, inside the interval it was proven to have."""
    to = builder()
    value: Value = kernel(*(symbol(to, bounds, array.shape) for array, bounds in inputs))
    to.graph.outputs = [value.tensor]
    model = gs.export_onnx(to.graph)
    model.ir_version = 10
    feeds = {f"input{n}": array.astype(np.int64) for n, (array, _) in enumerate(inputs)}
    [found] = Session(model, threads=1).run(feeds).values()
    expected = kernel(*feeds.values())
    np.testing.assert_array_equal(found, expected)
    assert value.low <= expected.min()
    assert expected.max() <= value.high
    return value


def integers(bounds: Bounds, *shape: int) -> np.ndarray:
    """Random ones, with both ends."""
    q = np.random.default_rng(0).integers(bounds[0], bounds[1] + 1, shape)
    q.flat[: q.size // 8] = bounds[0]
    q.flat[-(q.size // 8) :] = bounds[1]
    return q


def test_square_roots_of_all_sizes() -> None:
    """Also 2^31 .. 2^32, which onnxruntime's Max of int64 takes for negative, [n] and [n, 1]."""
    random = np.random.default_rng(0)
    v = random.integers(0, 1 << 62, 4000) >> random.integers(0, 62, 4000)
    v = np.concatenate([v, (1 << 31) + np.arange(-2, 3), (1 << 32) + np.arange(-2, 3)])
    same_in_onnxruntime(isqrt, (v[:, None], (0, (1 << 62) - 1)))
    same_in_onnxruntime(isqrt, (v.reshape(-1, 5, 1), (-5, (1 << 62) - 1)))


@pytest.mark.parametrize("mode", ["poly", "paper"])
@pytest.mark.parametrize("length", [1, 2, 3, 64, 512, 768, 4096, LONGEST])
@pytest.mark.parametrize("bounds", [INT16, (-65535, 0), (0, 65535), (-128, 127)])
def test_layer_norm(mode: Mode, length: int, bounds: Bounds) -> None:
    q = integers(bounds, 3, length)
    for scale, epsilon in (1e-3, 1e-5), (1.0, 0.0), (2.0**-20, 1e-5), (2.0**-60, 1e-5):
        y = same_in_onnxruntime(
            lambda q, s=scale, e=epsilon: normalize(q, s, length, e, mode)[0], (q, bounds)
        )
        assert max(-y.low, y.high) <= 1 << (30 if mode == "paper" else 25)


@law
@given(scale=scales, epsilon=st.floats(-30, 6).map(lambda exponent: 10.0**exponent), data=st.data())
def test_layer_norm_is_proven_to_fit_64_bits(
    scale: float, epsilon: float, data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, LONGEST))
    low = data.draw(st.integers(-65535, 0))
    q = symbol(builder(), (low, low + 65535), (1, length))
    normalize(q, scale, length, epsilon)
    normalize(q, scale, length, epsilon, "paper")


@pytest.mark.parametrize("kernel", [erf, gelu])
@pytest.mark.parametrize("mode", ["poly", "paper", "lut"])
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-26, 1e-4, 10 / 127, 1.0])
def test_erf_and_gelu(kernel: Callable[..., Any], mode: Mode, scale: float) -> None:
    bounds = (-255, 255) if mode == "lut" else WIDE
    q = np.arange(bounds[0], bounds[1] + 1)
    y = same_in_onnxruntime(lambda q: kernel(q, scale, mode)[0], (q, bounds))
    assert max(-y.low, y.high) < 1 << 31


@law
@given(scales)
def test_erf_and_gelu_are_proven_to_need_32_bits_but_for_one_product(scale: float) -> None:
    for kernel in (erf, gelu):
        q = symbol(builder(), WIDE, (8,))
        y, _ = kernel(q, scale)
        assert y.dtype == np.int32
        wide = [n for n in q.builder.graph.nodes if np.dtype(n.outputs[0].dtype) == np.int64]
        assert [n.op for n in wide if n.op != "Cast"] == ["Mul", "Add", "Div"]
        if scale <= 1:
            kernel(symbol(builder(), WIDE, (8,)), scale, "paper")


@pytest.mark.parametrize("a_bounds", [INT16, (0, 255)])
@pytest.mark.parametrize("b_bounds", [INT16, (0, 65535), (1, 255)])
def test_division(a_bounds: Bounds, b_bounds: Bounds) -> None:
    a, b = integers(a_bounds, 40, 50), integers(b_bounds, 50, 40).T
    y = same_in_onnxruntime(lambda a, b: divide(a, 1, b, 1)[0], (a, a_bounds), (b, b_bounds))
    assert y.dtype == np.int32
    same_in_onnxruntime(lambda b: reciprocal(b, 1)[0], (b, b_bounds))


@pytest.mark.parametrize("bounds", [INT16, (-128, 127)])
def test_averages(bounds: Bounds) -> None:
    q = integers(bounds, 3, 5, 64)
    same_in_onnxruntime(lambda q: mean(q, 1.0, (3, 5, 64), (1, 2))[0], (q, bounds))
    counts = np.arange(1, 65)
    same_in_onnxruntime(lambda q: average(q, counts, 4), (q, bounds))
    count = integers((1, 3000), 3, 5, 1)
    same_in_onnxruntime(lambda q, n: average(q, n, 8), (q, bounds), (count, (1, 3000)))


def test_tables() -> None:
    entries = table(np.tanh, 0.01, 3, -128, 127, 1 / 255, 128, 0, 255)
    q = np.arange(-128, 128)
    y = same_in_onnxruntime(lambda q: lookup(q, entries, -128), (q, (-128, 127)))
    assert y.dtype == np.uint8
