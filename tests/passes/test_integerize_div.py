from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.kernels.division import divide
from onnx_intq.lowering import GRIDS
from onnx_intq.registry import load
from onnx_intq.transform import Context

IntegerizeDiv = load("integerize_div")
law = settings(max_examples=60, deadline=None)
SHAPES = [(("n, 6", "n, 6"), (100, 6), (100, 6)), (("n, 6", "n, 1"), (100, 6), (100, 1))]
Parameters = tuple[str, float, int]
A, B, Y = ("int8", 0.05, 3), ("uint8", 0.02, 0), ("int8", 0.1, -3)


@st.composite
def grids(draw: st.DrawFn) -> Parameters:
    dtype = draw(st.sampled_from(sorted(GRIDS)))
    grid = GRIDS[dtype]
    scale = 2.0 ** draw(st.floats(-1, 5)) / (grid.high - grid.low)
    return dtype, float(np.float32(scale)), draw(st.integers(grid.low, grid.high))


@law
@given(grids(), grids(), grids(), st.sampled_from(SHAPES))
def test_every_integer_is_that_of_the_kernel(
    place: Any, a: Parameters, b: Parameters, y: Parameters, shapes: Any
) -> None:
    texts, *sizes = shapes
    model = place.graph("c = Div(a, b)", y, a, b, shapes=texts)
    assert place.lower(IntegerizeDiv(), model) == []
    q = [
        place.integers(p[0], size, seed)
        for seed, (p, size) in enumerate(zip((a, b), sizes, strict=True))
    ]
    q[1] = np.roll(q[1], 7)
    centred = [values.astype(np.int64) - p[2] for values, p in zip(q, (a, b), strict=True)]
    found = divide(centred[0], a[1], centred[1], b[1])
    np.testing.assert_array_equal(place.outputs(model, *q), place.requantized(*found, y))


@law
@given(grids(), grids(), st.sampled_from([1.0, -3.0, 1e-4]), st.booleans())
def test_constants_are_divided(
    place: Any, b: Parameters, y: Parameters, largest: float, scalar: bool
) -> None:
    values = (
        np.float32(largest)
        if scalar
        else np.linspace(-1, 1, 6, dtype=np.float32) * np.float32(largest)
    )
    y = (y[0], y[1] * abs(largest), y[2])
    model = place.graph("c = Div(k, a)", y, b, k=values)
    assert place.lower(IntegerizeDiv(), model) == []
    q = place.integers(b[0], (100, 6))
    scale = abs(float(np.float32(largest))) / 2**15
    dividend = np.rint(values.astype(float) / scale).astype(np.int64)
    found = divide(dividend, scale, q.astype(np.int64) - b[2], b[1], 15)
    np.testing.assert_array_equal(place.outputs(model, q), place.requantized(*found, y))


@pytest.mark.parametrize("a", [A, ("int16", 6 / 32768, 50)])
@pytest.mark.parametrize("b", [("uint8", 0.02, 0), ("int8", 0.02, 0), ("uint16", 5 / 65535, 0)])
@pytest.mark.parametrize("y", [Y, ("int16", 40 / 65535, 7)])
def test_is_the_rounded_quotient(place: Any, a: Parameters, b: Parameters, y: Parameters) -> None:
    """Where the divisor is not 0: half a step of the kernel's quotient, half one of the result."""
    model = place.graph("c = Div(a, b)", y, a, b, shapes=("n, 6", "n, 6"))
    assert place.lower(IntegerizeDiv(), model) == []
    q = [place.integers(p[0], (900, 6), seed) for seed, p in enumerate((a, b))]
    divisor = place.reals(q[1], b)
    q[1][divisor == 0] += 1
    real = place.saturated(place.reals(q[0], a) / place.reals(q[1], b), y)
    off = np.abs(place.reals(place.outputs(model, *q), y) - real)
    assert off.max() <= y[1] / 2 * (1 + 1e-6) + a[1] / b[1] * 2.0**-15


def test_a_divisor_of_0_counts_as_one_step(place: Any) -> None:
    y = ("int16", 0.01, 0)
    model = place.graph("c = Div(a, b)", y, A, B, shapes=("n, 6", "n, 6"))
    assert place.lower(IntegerizeDiv(), model) == []
    q = place.integers("int8", (43, 6))
    zeros = np.zeros_like(q, np.uint8)
    found = [place.outputs(model, q, divisor) for divisor in (zeros, zeros + 1)]
    np.testing.assert_array_equal(*found)


DECLINED = [
    ("n = Neg(a) c = Div(n, b)", "its input 'n' is not quantized"),
    ("n = Neg(b) c = Div(a, n)", "its input 'n' is not quantized"),
    ("c = Div(zeros, b)", "it divides a constant without a finite value other than 0"),
    ("c = Div(endless, b)", "it divides a constant without a finite value other than 0"),
]


@pytest.mark.parametrize(("body", "why"), DECLINED)
def test_declines_with_the_reason(place: Any, body: str, why: str) -> None:
    constants = {"zeros": np.zeros(6, np.float32), "endless": np.full(6, np.inf, np.float32)}
    model = place.graph(body, Y, A, B, shapes=("n, 6", "n, 6"), **constants)
    before, ctx = len(model.nodes), Context()
    assert IntegerizeDiv().run(model, ctx) == 0
    assert [found for _, found in ctx.remaining] == [why]
    assert ctx.remaining == ctx.skipped
    assert len(model.nodes) == before


def test_quotients_by_a_constant_are_another_pass_s(place: Any) -> None:
    model, ctx = place.graph("c = Div(a, k)", Y, A, k=np.float32(3)), Context()
    assert IntegerizeDiv().run(model, ctx) == 0
    assert ctx.skipped == []
    assert place.lower(load("integerize_mul")(), model) == []
    q = place.integers("int8", (43, 6))
    off = np.abs(place.reals(place.outputs(model, q), Y) - place.reals(q, A) / 3)
    assert off.max() <= Y[1] / 2 * (1 + 1e-6)
