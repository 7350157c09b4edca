"""Activations of straight lines that stand alone: equal to `grid.requantize`, bit for bit."""

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

IntegerizeActivation = load("integerize_activation")
law = settings(max_examples=40, deadline=None)
GRID_NAMES = st.sampled_from(sorted(GRIDS))


def graph(x: str, body: str, *, y: str = "int8", more: str = "", **given_: Any) -> Any:
    """The node `body` of a, the dequantized x; its result c is quantized to `y`."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g ({x} x{more}) => ({y} q) {{
            a = DequantizeLinear(x, xs, xz)
            {body}
            q = QuantizeLinear(c, ys, yz)
        }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    scales = {"xs": np.float32(0.02), "ys": np.float32(0.05)}
    points = {"xz": np.zeros((), x.partition("[")[0]), "yz": np.zeros((), y)}
    for name, values in (scales | points | given_).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def lower(model: gs.Graph) -> list[str]:
    """Lower; doing so again must change nothing. Returns why something remains."""
    ctx = Context(facts={"complete"})
    first, second = run(model, [IntegerizeActivation()] * 2, ctx, [well_formed])
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
    return np.linspace(info.min, info.max, 3001).astype(dtype)


def line(centred: Any, factor: Any, y: str, yz: int) -> Any:
    """The integers of centred * factor, which are real steps of the result."""
    grid, factor = GRIDS[y], np.asarray(factor, np.float64)
    found = dyadic(np.abs(factor), 62 - grid.bits)
    signed = Dyadic(found.b * np.sign(factor).astype(np.int64), found.c)
    return requantize(centred, signed, zero_point=yz, low=grid.low, high=grid.high)


FUNCTIONS: dict[str, Any] = {
    "c = Relu(a)": lambda r: np.maximum(r, 0),
    "c = Clip(a, low, high)": lambda r: np.clip(r, -0.7, 1.3),
    "c = Clip(a, , high)": lambda r: np.minimum(r, 1.3),
    "c = Clip(a)": lambda r: r,
    "c = Abs(a)": np.abs,
    "c = Neg(a)": np.negative,
    "c = LeakyRelu(a)": lambda r: np.where(r < 0, np.float32(0.01) * r, r),
    "c = LeakyRelu<alpha = 2.5>(a)": lambda r: np.where(r < 0, 2.5 * r, r),
    "c = LeakyRelu<alpha = -0.5>(a)": lambda r: np.where(r < 0, -0.5 * r, r),
    "c = PRelu(a, slope)": lambda r: np.where(r < 0, np.float32(0.2) * r, r),
    "s = LeakyRelu(a) c = Clip(s, low, high)": lambda r: np.clip(
        np.where(r < 0, np.float32(0.01) * r, r), -0.7, 1.3
    ),
    "s = Neg(a) c = Relu(s)": lambda r: np.maximum(-r, 0),
}
LIMITS = {"low": np.float32(-0.7), "high": np.float32(1.3), "slope": np.float32(0.2)}


@law
@given(st.data(), st.sampled_from(sorted(FUNCTIONS)), GRID_NAMES, GRID_NAMES)
def test_the_nearest_integer_is_found(data: st.DataObject, body: str, x_type: str, y: str) -> None:
    xz, yz = (
        np.asarray(data.draw(st.integers(np.iinfo(t).min, np.iinfo(t).max)), t) for t in (x_type, y)
    )
    xs, ys = (np.float32(data.draw(st.floats(2.0**-10, 0.25, width=32))) for _ in range(2))
    given_ = {"xs": xs, "ys": ys, "xz": xz, "yz": yz} | LIMITS
    model = lowered(f"{x_type}[n]", body, y=y, **given_)
    x = every(x_type)
    real = (x.astype(np.int64) - int(xz)) * float(xs)
    grid = GRIDS[y]
    expected = np.clip(FUNCTIONS[body](real) / float(ys) + int(yz), grid.low, grid.high)
    # What the multiplier's 31 bits lose; and limits are rounded half to even, as in floats.
    lost = 2.0**-30 * np.abs(real / ys).max() + 1e-3
    assert np.abs(outputs(model, x=x) - expected).max() <= 0.5 + lost


@pytest.mark.parametrize("op", ["Relu", "Abs", "Neg"])
@pytest.mark.parametrize("x_type", GRIDS)
@pytest.mark.parametrize("y", GRIDS)
def test_every_element_equals_the_reference(op: str, x_type: str, y: str) -> None:
    given_ = {"xz": np.asarray(100, x_type), "yz": np.asarray(20, y)}
    model = lowered(f"{x_type}[n]", f"c = {op}(a)", y=y, **given_)
    x = every(x_type)
    centred = x.astype(np.int64) - 100
    centred = {"Relu": np.maximum(centred, 0), "Abs": np.abs(centred), "Neg": -centred}[op]
    factor = float(np.float32(0.02)) / float(np.float32(0.05))
    np.testing.assert_array_equal(outputs(model, x=x), line(centred, factor, y, 20))


@pytest.mark.parametrize("shape", [(3, 1), (1, 1), (3, 5), (5,)])
@pytest.mark.parametrize("stored", [False, True])
def test_slopes_may_differ_by_channel(shape: tuple[int, ...], stored: bool) -> None:
    slope = np.linspace(-0.5, 2, int(np.prod(shape))).astype(np.float32).reshape(shape)
    given_: dict[str, Any] = {"xz": np.uint8(128), "slope": slope}
    body = "c = PRelu(a, slope)"
    if stored:
        integers = np.rint(slope * 10).astype(np.int8)
        slope = integers.astype(np.float32) * np.float32(0.1)
        given_ |= {"slope": integers, "ks": np.float32(0.1)}
        body = "k = DequantizeLinear(slope, ks) c = PRelu(a, k)"
    model = lowered("uint8[2, 3, 5]", body, **given_)
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 5)).astype(np.uint8)
    centred, factor = x.astype(np.int64) - 128, float(np.float32(0.02)) / float(np.float32(0.05))
    falling = line(centred, factor * slope.astype(np.float64), "int8", 0)
    expected = np.where(centred < 0, falling, line(centred, factor, "int8", 0))
    np.testing.assert_array_equal(outputs(model, x=x), expected)


def test_limits_in_the_wrong_order_give_the_higher_one_as_in_onnx() -> None:
    given_: dict[str, Any] = {"low": np.float32(1), "high": np.float32(-1)}
    model = graph("int8[n]", "c = Clip(a, low, high)", **given_)
    before = outputs(model, x=every("int8"))
    assert lower(model) == []
    np.testing.assert_array_equal(outputs(model, x=every("int8")), before)


def test_limits_may_be_stored_as_integers() -> None:
    body = "low = DequantizeLinear(k, ks) c = Clip(a, low)"
    model = lowered("int8[n]", body, k=np.int8(-5), ks=np.float32(0.1))
    assert outputs(model, x=every("int8")).min() == -10


DECLINED: list[tuple[str, str, dict[str, Any], str]] = [
    ("c = Clip(a, f)", ", float f", {}, "its limits are computed at run time"),
    ("c = PRelu(a, f)", ", float f", {}, "its slope is computed at run time"),
    ("c = Relu(f)", ", float[2] f", {}, "its input 'f' is not quantized"),
    ("c = Abs(a)", "", {"xs": np.float32(1e12)}, "a requantisation by"),
    ("s = Relu(a) c = Clip(s, low)", "", LIMITS, "its result is not quantized once"),
]


@pytest.mark.parametrize(("body", "more", "constants", "why"), DECLINED)
def test_declines_with_the_reason(
    body: str, more: str, constants: dict[str, Any], why: str
) -> None:
    model = graph("uint8[2]", body, more=more, **constants)
    before = len(model.nodes)
    (found, *_) = lower(model)
    assert found.startswith(why)
    assert len(model.nodes) == before
