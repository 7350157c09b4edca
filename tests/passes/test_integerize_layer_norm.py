from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.kernels.layer_norm import normalize
from onnx_intq.lowering import GRIDS
from onnx_intq.nonlinear import onto_channels
from onnx_intq.registry import load
from onnx_intq.transform import Context

IntegerizeLayerNorm: Any = load("integerize_layer_norm")
law = settings(max_examples=60, deadline=None)
RANDOM = np.random.default_rng(0)
Parameters = tuple[str, float, int]
X, Y = ("int16", 0.001, 12), ("int8", 0.04, -3)


@st.composite
def grids(draw: st.DrawFn) -> Parameters:
    dtype = draw(st.sampled_from(sorted(GRIDS)))
    grid = GRIDS[dtype]
    scale = 2.0 ** draw(st.floats(-4, 5)) / (grid.high - grid.low)
    return dtype, float(np.float32(scale)), draw(st.integers(grid.low, grid.high))


def vectors(length: int, spread: float) -> dict[str, Any]:
    """Scales of either sign and 0; biases."""
    gamma = RANDOM.normal(0, spread, length).astype(np.float32)
    gamma[0] = 0
    return {"gamma": gamma, "beta": RANDOM.normal(0, spread, length).astype(np.float32)}


def real_norm(x: Any, epsilon: float) -> Any:
    centre = x - x.mean(axis=-1, keepdims=True)
    return centre / np.sqrt(np.square(centre).mean(axis=-1, keepdims=True) + epsilon)


@law
@given(
    x=grids(),
    y=grids(),
    length=st.sampled_from([1, 2, 29, 512]),
    epsilon=st.sampled_from([0.0, 1e-5, 1e-3, 10.0]),
    spread=st.sampled_from([1e-6, 1.0, 30.0]),
    biased=st.booleans(),
    mode=st.sampled_from(["poly", "paper", "lut"]),
)
def test_every_integer_is_the_kernels_on_its_channels_grid(
    place: Any,
    x: Parameters,
    y: Parameters,
    length: int,
    epsilon: float,
    spread: float,
    biased: bool,
    mode: Any,
) -> None:
    found = vectors(length, spread)
    if not biased:
        del found["beta"]
    names = ", ".join(["a", *found])
    body = f"c = LayerNormalization<epsilon = {epsilon}>({names})"
    model = place.graph(body, y, x, shapes=(f"n, m, {length}",), **found)
    assert place.lower(IntegerizeLayerNorm(mode=mode), model) == []
    q = place.integers(x[0], (2, 5, length), seed=length)
    q[0, 0] = q[0, 0, 0]  # a constant row
    grid = GRIDS[y[0]]
    epsilon = float(np.float32(epsilon))
    normal, step = normalize(q.astype(np.int64) - x[2], x[1], length, epsilon, mode)
    expected = onto_channels(
        normal,
        found["gamma"].astype(float) * (step / y[1]),
        found.get("beta", np.zeros(1)).astype(float) / y[1],
        zero_point=y[2],
        low=grid.low,
        high=grid.high,
    )
    np.testing.assert_array_equal(place.outputs(model, q), expected)


@pytest.mark.parametrize("x", [("int16", 0.001, 12), ("uint8", 0.05, 100)])
@pytest.mark.parametrize("y", [("int16", 60 / 65535, 5), ("uint8", 16 / 255, 128)])
@pytest.mark.parametrize("epsilon", [1e-5, 1.0])
def test_is_as_near_to_the_real_norm_as_the_grids_allow(
    place: Any, x: Parameters, y: Parameters, epsilon: float
) -> None:
    found = vectors(256, 1.0)
    body = f"c = LayerNormalization<epsilon = {epsilon}>(a, gamma, beta)"
    model = place.graph(body, y, x, shapes=("n, 256",), **found)
    assert place.lower(IntegerizeLayerNorm(), model) == []
    q = place.integers(x[0], (64, 256))
    normal = real_norm(place.reals(q, x), float(np.float32(epsilon)))
    real = normal * found["gamma"].astype(float) + found["beta"].astype(float)
    off = np.abs(place.reals(place.outputs(model, q), y) - place.saturated(real, y))
    kernel = 2.0**-20 * np.abs(normal) + 2.0**-19
    assert (off <= y[1] / 2 * (1 + 1e-6) + kernel * np.abs(found["gamma"])).all()


def test_an_activation_behind_it_is_its_limit(place: Any) -> None:
    found, q = vectors(29, 1.0), place.integers("int16", (40, 29))
    bodies = "c = LayerNormalization(a, gamma)", "d = LayerNormalization(a, gamma) c = Relu(d)"
    del found["beta"]
    models = [place.graph(body, Y, X, shapes=("n, 29",), **found) for body in bodies]
    for model in models:
        assert place.lower(IntegerizeLayerNorm(), model) == []
    alone, limited = (place.outputs(model, q) for model in models)
    np.testing.assert_array_equal(limited, np.maximum(alone, Y[2]))


LN = "c = LayerNormalization"
DECLINED = [
    (f"{LN}<axis = 1>(a, gamma)", "n, m, 6", "it normalises from axis 1 on; expected the last"),
    (f"{LN}<axis = -2>(a, gamma)", "n, m, 6", "it normalises from axis -2 on; expected the last"),
    ("g = Neg(gamma) " + f"{LN}(a, g)", "n, 6", "its scale or bias is computed at run time"),
    ("g = Neg(gamma) " + f"{LN}(a, gamma, g)", "n, 6", "its scale or bias is computed at run"),
    (f"{LN}(a, huge)", "n, 6", "a requantisation by"),
    (f"{LN}(a, gamma, huge)", "n, 6", "its bias lies far outside the range of its result"),
    (f"n = Neg(a) {LN}(n, gamma)", "n, 6", "its input 'n' is not quantized"),
    ("d, c = LayerNormalization(a, gamma)", "n, 6", "its mean or deviation is read"),
]


@pytest.mark.parametrize(("body", "shape", "why"), DECLINED)
def test_declines_with_the_reason(place: Any, body: str, shape: str, why: str) -> None:
    constants = {"gamma": np.ones(6, np.float32), "huge": np.full(6, 1e20, np.float32)}
    model, ctx = place.graph(body, Y, X, shapes=(shape,), **constants), Context()
    before = len(model.nodes)
    assert IntegerizeLayerNorm().run(model, ctx) == 0
    assert ctx.remaining == ctx.skipped
    assert [found.startswith(why) for _, found in ctx.remaining] == [True]
    assert len(model.nodes) == before


def test_the_length_may_be_that_of_the_scale_alone(place: Any) -> None:
    found = vectors(6, 1.0)
    fixed, dynamic = (
        place.graph(f"{LN}(a, gamma, beta)", Y, X, shapes=(shape,), **found)
        for shape in ("n, 6", "n, m")
    )
    q = place.integers("int16", (40, 6))
    for model in (fixed, dynamic):
        assert place.lower(IntegerizeLayerNorm(), model) == []
    np.testing.assert_array_equal(*(place.outputs(model, q) for model in (fixed, dynamic)))
