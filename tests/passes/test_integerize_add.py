"""Sums and differences of integers: one rounding, equal to `grid.weighted_sum` bit for bit."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.grid import common_exponent, weighted_sum
from onnx_intq.integer_only import prove
from onnx_intq.lowering import GRIDS
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

IntegerizeAdd = load("integerize_add")
FRACTION = 2.0**14
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
    first, second = run(model, [IntegerizeAdd()] * 2, ctx, [well_formed])
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
    some = np.linspace(info.min, info.max, 300).astype(dtype)
    return np.concatenate([some, some[:9] + np.asarray(1, dtype), some[-9:] - np.asarray(1, dtype)])


def reference(
    centred: list[Any], scales: list[float], ys: float, y: str, yz: int, ends: Any = None
) -> Any:
    """What the law says; scales are negative for what is subtracted."""
    grid = GRIDS[y]
    low, high = ends or (grid.low, grid.high)
    factors, c = common_exponent([s / ys for s in scales], 62 - grid.bits)
    return weighted_sum(centred, factors, c, zero_point=yz, low=low, high=high)


def point(draw: st.DataObject, dtype: str) -> Any:
    info = np.iinfo(dtype)
    return np.asarray(draw.draw(st.integers(info.min, info.max)), dtype)


SCALES = st.floats(2.0**-12, 1.0, width=32)


@law
@given(st.data(), GRID_NAMES, GRID_NAMES, GRID_NAMES, st.sampled_from(["Add", "Sub"]))
def test_any_two_tensors_are_summed_exactly(
    data: st.DataObject, u_type: str, v_type: str, y: str, op: str
) -> None:
    us, vs, ys = (np.float32(data.draw(SCALES)) for _ in range(3))
    uz, vz, yz = (point(data, dtype) for dtype in (u_type, v_type, y))
    given_ = {"us": us, "vs": vs, "ys": ys, "uz": uz, "vz": vz, "yz": yz}
    inputs = f"{u_type}[m, 1] u, {v_type}[n] v"
    model = lowered(inputs, f"c = {op}(a, b)", y=y, **given_)
    u, v = every(u_type)[:, None], every(v_type)
    centred = [u.astype(np.int64) - int(uz), v.astype(np.int64) - int(vz)]
    sign = -1 if op == "Sub" else 1
    expected = reference(centred, [float(us), sign * float(vs)], float(ys), y, int(yz))
    result = outputs(model, u=u, v=v)
    np.testing.assert_array_equal(result, expected)
    # And the law itself is the nearest integer, but for factors of 31 bits in all.
    real = (centred[0] * float(us) + sign * centred[1] * float(vs)) / float(ys) + int(yz)
    inside = (GRIDS[y].low < result) & (result < GRIDS[y].high)
    _, c = common_exponent([float(us / ys), float(vs / ys)], 62 - GRIDS[y].bits)
    lost = sum(float(np.abs(q).max()) for q in centred) * 2.0 ** -(c + 1)
    assert np.abs(result - real)[inside].max(initial=0) <= 0.5 + lost + 1e-6


ACTIVATED = {
    "s = Add(a, b) c = Relu(s)": (10, 127),
    "s = Add(a, b) c = Clip(s, low, high)": (-10, 30),
    "s = Sub(a, b) c = Relu(s)": (10, 127),
    "s = Add(b, a) c = Clip(s, , high)": (-128, 30),
}


@pytest.mark.parametrize("body", ACTIVATED)
def test_an_activation_is_in_the_limits(body: str) -> None:
    given_: dict[str, Any] = {"yz": np.int8(10), "low": np.float32(-1), "high": np.float32(1)}
    inputs = "uint8[256, 1] u, int8[256] v"
    model = lowered(inputs, body, **given_)
    feeds = {"u": every("uint8")[:, None], "v": every("int8")}
    centred = [feeds["u"].astype(np.int64) - 7, feeds["v"].astype(np.int64) + 7]
    us, vs, ys = (float(np.float32(v)) for v in (0.02, 0.03, 0.05))
    scales = [us, -vs if "Sub" in body else vs]
    result = outputs(model, **feeds)
    expected = reference(centred, scales, ys, "int8", 10, ACTIVATED[body])
    np.testing.assert_array_equal(result, expected)
    moved = result.astype(int) - outputs(graph(inputs, body, **given_), **feeds)
    # 0.02 and 0.03 in steps of 0.05: every fifth sum is a tie, which floats round to even.
    assert np.abs(moved).max() <= 1


CONSTANTS = [(), (1,), (5,), (1, 5), (3, 1), (3, 5), (2, 3, 5), (2, 1, 1)]


@pytest.mark.parametrize("shape", CONSTANTS)
@pytest.mark.parametrize(
    "body", ["c = Add(a, k)", "c = Add(k, a)", "c = Sub(a, k)", "c = Sub(k, a)"]
)
@pytest.mark.parametrize("y", ["int8", "uint16"])
def test_constants_are_added_to_2_to_the_minus_15_of_a_step(
    shape: tuple[int, ...], body: str, y: str
) -> None:
    k = np.asarray(np.random.default_rng(0).uniform(-2, 2, shape), np.float32)
    model = lowered("uint8[3, 5] u, int8[n] v", body, y=y, k=k, yz=np.asarray(50, y))
    u = np.random.default_rng(1).integers(0, 256, (3, 5)).astype(np.uint8)
    us, ys = float(np.float32(0.02)), float(np.float32(0.05))
    steps = np.rint(k.astype(np.float64) / ys * FRACTION).astype(np.int64)
    signs = {"c = Sub(a, k)": (1, -1), "c = Sub(k, a)": (-1, 1)}.get(body, (1, 1))
    scales = [signs[0] * us, signs[1] * ys / FRACTION]
    centred = [u.astype(np.int64) - 7, steps]
    result = outputs(model, u=u, v=np.zeros(1, np.int8))
    np.testing.assert_array_equal(result, reference(centred, scales, ys, y, 50))
    real = (signs[0] * centred[0] * us + signs[1] * k.astype(np.float64)) / ys + 50
    real = np.clip(real, GRIDS[y].low, GRIDS[y].high)
    assert np.abs(result - real).max() <= 0.5 + 2.0**-15 + 1e-6


def test_constants_may_be_stored_as_integers() -> None:
    k = np.array([-100, 0, 3, 100], np.int8)
    body = "k = DequantizeLinear<axis = 0>(stored, ks, kz) c = Add(a, k)"
    scales = np.array([0.01, 0.02, 0.03, 0.04], np.float32)
    given_ = {"stored": k, "ks": scales, "kz": np.array([1, 2, 3, 4], np.int8)}
    model = lowered("uint8[9, 4] u, int8[n] v", body, **given_)
    u = np.random.default_rng(1).integers(0, 256, (9, 4)).astype(np.uint8)
    real = (u.astype(float) - 7) * 0.02 + (k.astype(float) - [1, 2, 3, 4]) * scales
    result = outputs(model, u=u, v=np.zeros(1, np.int8))
    assert np.abs(result - np.clip(real / 0.05, -128, 127)).max() <= 0.5 + 1e-3


def test_a_tensor_may_be_added_to_itself() -> None:
    model = lowered("uint8[256] u, int8[n] v", "c = Add(a, a)")
    result = outputs(model, u=every("uint8"), v=np.zeros(1, np.int8))
    us, ys = float(np.float32(0.02)), float(np.float32(0.05))
    centred = np.arange(256) - 7
    np.testing.assert_array_equal(result, reference([centred] * 2, [us, us], ys, "int8", 0))


def test_sums_of_integers_are_left_alone() -> None:
    body = "n = Shape(a) m = Add(n, n) d = Expand(a, m) c = Add(a, b)"
    model = graph("uint8[1] u, int8[1] v", body)
    assert lower(model) == []
    assert prove(model) == []


DECLINED: list[tuple[str, dict[str, Any], str]] = [
    ("c = Add(a, f)", {}, "its input 'f' is not quantized"),
    (
        "c = Add(a, k)",
        {"k": np.array([0, -np.inf], np.float32)},
        "it adds a constant far outside the range of its result",
    ),
    (
        "c = Sub(k, a)",
        {"k": np.array([0, 1e9], np.float32)},
        "it adds a constant far outside the range of its result",
    ),
    ("c = Add(a, k)", {"k": np.array([np.nan], np.float32)}, "it adds a constant far outside"),
    ("s = Add(a, b) c = Neg(s)", {}, "its result is not quantized once"),
    ("c = Add(a, b)", {"vs": np.float32(1e20)}, "a requantisation by"),
]


@pytest.mark.parametrize(("body", "constants", "why"), DECLINED)
def test_declines_with_the_reason(body: str, constants: dict[str, Any], why: str) -> None:
    model = graph("uint8[2] u, int8[2] v, float[2] f", body, **constants)
    before = len(model.nodes)
    (found,) = lower(model)
    assert found.startswith(why)
    assert len(model.nodes) == before
