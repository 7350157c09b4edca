"""Products of integers, and products and quotients with constants: one rounding, bit for bit."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.grid import Dyadic, dyadic, requantize
from onnx_intq.integer_only import prove
from onnx_intq.lowering import GRIDS
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

IntegerizeMul = load("integerize_mul")
law = settings(max_examples=60, deadline=None)
GRID_NAMES = st.sampled_from(sorted(GRIDS))


def graph(inputs: str, body: str, *, y: str = "int8", **given_: Any) -> Any:
    """The node `body` of a and b, the dequantized u and v; its result c is quantized to `y`."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({y} q) {{
            a = DequantizeLinear(u, us, uz)
            b = DequantizeLinear(v, vs, vz)
            {body}
            q = QuantizeLinear(c, ys, yz)
        }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    scales = {"us": 0.02, "vs": 0.03, "ys": 0.05}
    constants = {name: np.float32(value) for name, value in scales.items()}
    points = {"uz": np.uint8(7), "vz": np.int8(-7), "yz": np.zeros((), y)}
    for name, values in (constants | points | given_).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def lower(model: gs.Graph) -> list[str]:
    """Lower; doing so again must change nothing. Returns why something remains."""
    ctx = Context(facts={"complete"})
    first, second = run(model, [IntegerizeMul()] * 2, ctx, [well_formed])
    assert second.changes == 0
    assert second.skipped == first.skipped == first.remaining
    return [why for _, why in first.skipped]


def lowered(*arguments: Any, **options: Any) -> gs.Graph:
    model = graph(*arguments, **options)
    assert lower(model) == []
    assert prove(model) == []
    assert [t.name for t in model.outputs] == ["q"]
    return model


def outputs(model: gs.Graph, **feeds: Any) -> Any:
    return Session(model_from_graph(model), threads=1).run(feeds, ["q"])["q"]


def every(dtype: str) -> Any:
    """All integers of a type; of 16 bits, the ends and some between."""
    info = np.iinfo(dtype)
    if info.bits == 8:
        return np.arange(info.min, info.max + 1, dtype=dtype)
    return np.linspace(info.min, info.max, 300).astype(dtype)


def reference(product: Any, factor: Any, y: str, yz: int, bits: int = 31) -> Any:
    """What the law says; factors are real steps of the result per step of the product."""
    grid, factor = GRIDS[y], np.asarray(factor, np.float64)
    found = dyadic(np.abs(factor), 62 - grid.bits, bits)
    signed = Dyadic(found.b * np.sign(factor).astype(np.int64), found.c)
    return requantize(product, signed, zero_point=yz, low=grid.low, high=grid.high)


def bits_for(*operands: tuple[str, int]) -> int:
    """Bits that a product leaves of 62, 31 at most."""
    reaches = [max(z - np.iinfo(t).min, np.iinfo(t).max - z) for t, z in operands]
    return min(31, 62 - int(np.prod([int(r) for r in reaches], dtype=object)).bit_length())


def point(draw: st.DataObject, dtype: str) -> Any:
    info = np.iinfo(dtype)
    return np.asarray(draw.draw(st.integers(info.min, info.max)), dtype)


SCALES = st.floats(2.0**-12, 1.0, width=32)


@law
@given(st.data(), GRID_NAMES, GRID_NAMES, GRID_NAMES)
def test_any_two_tensors_are_multiplied_exactly(
    data: st.DataObject, u_type: str, v_type: str, y: str
) -> None:
    us, vs = (np.float32(data.draw(SCALES)) for _ in range(2))
    uz, vz, yz = (point(data, dtype) for dtype in (u_type, v_type, y))
    u, v = every(u_type)[:, None], every(v_type)
    product = (u.astype(np.int64) - int(uz)) * (v.astype(np.int64) - int(vz))
    # The results fill their grid, or a part of it, or more than it.
    reach = float(us) * float(vs) * max(int(np.abs(product).max()), 1)
    ys = np.float32(reach / 2 ** GRIDS[y].bits * data.draw(st.sampled_from([0.1, 1.0, 30.0])))
    given_ = {"us": us, "vs": vs, "ys": ys, "uz": uz, "vz": vz, "yz": yz}
    model = lowered(f"{u_type}[m, 1] u, {v_type}[n] v", "c = Mul(a, b)", y=y, **given_)
    result = outputs(model, u=u, v=v)
    bits = bits_for((u_type, int(uz)), (v_type, int(vz)))
    factor = float(us) * float(vs) / float(ys)
    np.testing.assert_array_equal(result, reference(product, factor, y, int(yz), bits))
    # And the law itself is the nearest integer, but for what factors of 29 bits and more lose.
    inside = (GRIDS[y].low < result) & (result < GRIDS[y].high)
    moved = np.abs(result - (product * factor + int(yz)))[inside].max(initial=0)
    assert moved <= 0.5 + 2.0**-12


CONSTANTS = [(), (1,), (5,), (1, 5), (3, 1), (3, 5), (2, 3, 5)]
BODIES = {"c = Mul(a, k)": 1, "c = Mul(k, a)": 1, "c = Div(a, k)": -1}


@pytest.mark.parametrize("shape", CONSTANTS)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("y", ["int8", "uint16"])
@pytest.mark.parametrize("low", [-2.0, 0.5])
def test_constants_go_into_the_multiplier(
    shape: tuple[int, ...], body: str, y: str, low: float
) -> None:
    k = np.asarray(np.random.default_rng(0).uniform(low, 2, shape), np.float32)
    model = lowered("uint8[3, 5] u, int8[n] v", body, y=y, k=k, yz=np.asarray(50, y))
    u = np.random.default_rng(1).integers(0, 256, (3, 5)).astype(np.uint8)
    us, ys = float(np.float32(0.02)), float(np.float32(0.05))
    factor = us * k.astype(np.float64) ** BODIES[body] / ys
    product = u.astype(np.int64) - 7
    result = outputs(model, u=u, v=np.zeros(1, np.int8))
    np.testing.assert_array_equal(result, reference(product, factor, y, 50))
    real = np.clip(product * factor + 50, GRIDS[y].low, GRIDS[y].high)
    assert np.abs(result - real).max() <= 0.5 + 1e-6


def test_a_factor_of_zero_gives_zero() -> None:
    given_: dict[str, Any] = {"k": np.array([0, -0.0, 1], np.float32), "yz": np.int8(3)}
    model = lowered("uint8[9, 3] u, int8[n] v", "c = Mul(a, k)", **given_)
    result = outputs(model, u=np.full((9, 3), 107, np.uint8), v=np.zeros(1, np.int8))
    assert (result == [3, 3, 43]).all()


def test_constants_may_be_stored_as_integers() -> None:
    k, scales = np.array([-100, 1, 3, 100], np.int8), np.array([0.01, 0.02, 0.03, 0.04], np.float32)
    body = "k = DequantizeLinear<axis = 0>(stored, ks, kz) c = Mul(a, k)"
    given_: dict[str, Any] = {"stored": k, "ks": scales, "kz": np.array([1, 2, 3, 4], np.int8)}
    model = lowered("uint8[9, 4] u, int8[n] v", body, **given_)
    u = np.random.default_rng(1).integers(0, 256, (9, 4)).astype(np.uint8)
    real = (u.astype(float) - 7) * 0.02 * ((k.astype(float) - [1, 2, 3, 4]) * scales)
    result = outputs(model, u=u, v=np.zeros(1, np.int8))
    assert np.abs(result - np.clip(real / 0.05, -128, 127)).max() <= 0.5 + 1e-3


def test_a_square_is_exact_and_an_activation_is_in_the_limits() -> None:
    body = "s = Mul(a, a) c = Clip(s, low, high)"
    given_: dict[str, Any] = {"low": np.float32(0.2), "high": np.float32(4)}
    model = lowered("uint8[256] u, int8[n] v", body, **given_)
    us, ys = float(np.float32(0.02)), float(np.float32(0.05))
    result = outputs(model, u=every("uint8"), v=np.zeros(1, np.int8))
    square = (np.arange(256) - 7) ** 2
    expected = np.clip(reference(square, us * us / ys, "int8", 0), 4, 80)
    np.testing.assert_array_equal(result, expected)


def test_products_of_integers_and_swish_are_left_alone() -> None:
    body = "n = Shape(a) m = Mul(n, n) d = Expand(a, m) c = Add(d, b)"
    assert lower(graph("uint8[1] u, int8[1] v", body)) == []
    swish = "s = Sigmoid(a) c = Mul(a, s)"
    assert lower(graph("uint8[4] u, int8[4] v", swish)) == []


NOT_QUANTIZED = "its input 'f' is not quantized"
DECLINED: list[tuple[str, dict[str, Any], str]] = [
    ("c = Mul(a, f)", {}, NOT_QUANTIZED),
    ("c = Div(f, k)", {"k": np.ones(2, np.float32)}, NOT_QUANTIZED),
    ("c = Div(a, k)", {"k": np.array([0, 1], np.float32)}, "it divides by 0"),
    ("c = Mul(a, k)", {"k": np.array([1, np.inf], np.float32)}, "a requantisation by inf"),
    ("c = Mul(a, k)", {"k": np.array([1, np.nan], np.float32)}, "a requantisation by nan"),
    ("c = Mul(k, k)", {"k": np.ones(2, np.float32)}, "both its inputs are constant"),
    ("c = Mul(a, b)", {"vs": np.float32(1e20)}, "a requantisation by"),
    ("s = Mul(a, b) c = Neg(s)", {}, "its result is not quantized once"),
]


@pytest.mark.parametrize(("body", "constants", "why"), DECLINED)
def test_declines_with_the_reason(body: str, constants: dict[str, Any], why: str) -> None:
    model = graph("uint8[2] u, int8[2] v, float[2] f", body, **constants)
    before = len(model.nodes)
    (found,) = lower(model)
    assert found.startswith(why)
    assert len(model.nodes) == before
