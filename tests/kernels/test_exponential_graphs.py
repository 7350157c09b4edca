"""exp, sigmoid, tanh, swish, softmax, attention as ONNX nodes: what is proven, what is computed."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import Names
from onnx_intq.kernels.exponential import ANCHORED, LARGEST, Mode, decay, exp
from onnx_intq.kernels.sigmoid import glu, sigmoid, swish, tanh
from onnx_intq.kernels.softmax import log_softmax, softmax, softmax_matmul
from onnx_intq.runtime import Session
from onnx_intq.trace import Builder, Value

law = settings(derandomize=True, deadline=None, max_examples=100)
scales = st.floats(-60, 20).map(lambda exponent: 2.0**exponent)
Kernel = Callable[..., Any]
CASES: list[tuple[Mode, int]] = [("poly", 8), ("poly", 16), ("paper", 16), ("lut", 8)]
IR_VERSION, OPSET = 10, 21


def builder() -> Builder:
    graph = gs.Graph(opset=OPSET)
    return Builder(graph, Names(graph), {})


def symbol(to: Builder, low: int, high: int, *shape: int | str) -> Value:
    """A new int32 input with integers in [low, high]."""
    inputs = to.graph.inputs
    inputs.append(gs.Variable(f"input{len(inputs)}", np.int32, shape))
    return to.value(inputs[-1], low, high)


def types(value: Value) -> set[str]:
    return {str(np.dtype(node.outputs[0].dtype)) for node in value.builder.graph.nodes}


def in_onnxruntime(
    kernel: Kernel, *arrays: np.ndarray, bounds: tuple[int, int], dynamic: bool = False
) -> np.ndarray:
    """What the kernel's graph computes; `bounds` hold for all arrays."""
    to = builder()
    shapes = [
        [f"n{number}{axis}" if dynamic else size for axis, size in enumerate(array.shape)]
        for number, array in enumerate(arrays)
    ]
    found = kernel(*(symbol(to, *bounds, *shape) for shape in shapes))
    to.graph.outputs = [found.tensor]
    model = gs.export_onnx(to.graph)
    model.ir_version = IR_VERSION
    feeds = {f"input{n}": array.astype(np.int32) for n, array in enumerate(arrays)}
    computed: np.ndarray = next(iter(Session(model, threads=1).run(feeds).values()))
    return computed


def logits(bits: int) -> np.ndarray:
    """Normally distributed, up to the ends of the grid: [30, 29]."""
    x = np.random.default_rng(bits).normal(0, 1, (30, 29))
    scaled = x / np.abs(x).max() * ((1 << (bits - 1)) - 1)
    found: np.ndarray = np.rint(scaled).astype(np.int64)
    return found


@law
@given(scale=scales)
def test_polynomials_are_proven_to_need_32_bits(scale: float) -> None:
    """At no scale does a node leave int32, whatever the 16-bit inputs."""
    e, _ = decay(symbol(builder(), -LARGEST, LARGEST, 8), scale)
    assert 0 <= e.low <= e.high == ANCHORED.peak // 2
    assert "int64" not in types(e)
    for kernel in (sigmoid, tanh, swish):
        found, _ = kernel(symbol(builder(), -LARGEST, LARGEST, 8), scale)
        assert "int64" not in types(found)


@law
@given(scale=st.floats(-60, -0.53).map(lambda exponent: 2.0**exponent))
def test_the_published_algorithm_is_proven_to_fit_64_bits(scale: float) -> None:
    e, _ = decay(symbol(builder(), -LARGEST, LARGEST, 8), scale, "paper")
    assert 0 <= e.low <= e.high < 1 << 30
    sigmoid(symbol(builder(), -LARGEST, LARGEST, 8), scale, "paper")


@law
@given(
    mode=st.sampled_from(["poly", "paper"]),
    scale=scales,
    bits=st.integers(1, 16),
    multiplier=st.sampled_from([2.0**-40, 2.0**-8, 1.0, 2.0**8, 2.0**16]),
)
def test_rows_of_unknown_length_are_proven_to_fit_64_bits(
    mode: Mode, scale: float, bits: int, multiplier: float
) -> None:
    """Any 16-bit integers, rows of up to 2^16; the results need 32 bits."""
    scale = min(scale, math.log(2)) if mode == "paper" else scale
    q = symbol(builder(), -LARGEST, LARGEST, "n", "keys")
    assert softmax(q, scale, mode=mode, bits=bits)[0].dtype == np.int32
    assert log_softmax(q, scale, mode=mode)[0].dtype == np.int32
    v = symbol(q.builder, -255, 255, "keys", 8)
    found = softmax_matmul(
        q, scale, v, multiplier, v_zero_point=-255, zero_point=65535, low=0, high=65535, mode=mode
    )
    assert (found.low, found.high) == (0, 65535)


def test_the_elementwise_part_of_softmax_needs_32_bits() -> None:
    q = symbol(builder(), -32768, 32767, "n", "keys")
    softmax(q, 1e-3)
    wide = [n for n in q.builder.graph.nodes if np.dtype(n.outputs[0].dtype) == np.int64]
    sums = [n for n in wide if n.outputs[0].shape == ["n", 1]]
    assert {n.op for n in wide if n not in sums} == {"Cast"}


@pytest.mark.parametrize("kernel", [sigmoid, tanh, swish])
@pytest.mark.parametrize(("mode", "bits"), CASES)
def test_elementwise_graphs_compute_the_same(kernel: Kernel, mode: Mode, bits: int) -> None:
    largest = (1 << (bits - 1)) - 1
    q, scale = np.arange(-largest, largest + 1), 10 / largest
    found = in_onnxruntime(lambda q: kernel(q, scale, mode)[0], q, bounds=(-largest, largest))
    np.testing.assert_array_equal(found, kernel(q, scale, mode)[0])


@pytest.mark.parametrize(("mode", "bits"), CASES)
def test_the_graph_of_exp_computes_the_same(mode: Mode, bits: int) -> None:
    largest = (1 << bits) - 1
    q, scale = np.arange(-largest, 1), 10 / largest
    found = in_onnxruntime(lambda q: exp(q, scale, mode)[0], q, bounds=(-largest, 0))
    np.testing.assert_array_equal(found, exp(q, scale, mode)[0])


def test_the_graph_of_glu_computes_the_same() -> None:
    a, b = logits(8), logits(8)[:, ::-1].copy()
    found = in_onnxruntime(lambda a, b: glu(a, 0.1, b, 0.2)[0], a, b, bounds=(-128, 127))
    np.testing.assert_array_equal(found, glu(a, 0.1, b, 0.2)[0])


@pytest.mark.parametrize("kernel", [softmax, log_softmax])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(("mode", "bits"), CASES)
def test_graphs_of_rows_compute_the_same(
    kernel: Kernel, dynamic: bool, axis: int, mode: Mode, bits: int
) -> None:
    q, scale = logits(bits), 10 / (1 << (bits - 1))
    bounds = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    found = in_onnxruntime(
        lambda q: kernel(q, scale, axis, mode)[0], q, bounds=bounds, dynamic=dynamic
    )
    np.testing.assert_array_equal(found, kernel(q, scale, axis, mode)[0])


@pytest.mark.parametrize("mode", ["poly", "paper", "lut"])
@pytest.mark.parametrize("low", [-128, -129])
def test_the_graph_of_attention_computes_the_same(mode: Mode, low: int) -> None:
    """-128..127 multiply as 8-bit integers, wider ones as int64."""
    q = logits(8)
    v = np.random.default_rng(1).integers(low, 127, (29, 4))

    def kernel(q: Any, v: Any) -> Any:
        return softmax_matmul(
            q, 0.05, v, 0.9, v_zero_point=3, zero_point=5, low=-128, high=127, mode=mode
        )

    found = in_onnxruntime(kernel, q, v, bounds=(low, 127), dynamic=True)
    np.testing.assert_array_equal(found, kernel(q, v))
