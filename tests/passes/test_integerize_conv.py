"""Convolutions of integers: equal to a plain NumPy sum and `grid.requantize`, bit for bit."""

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
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
from onnx_intq.requantization import PRECISION
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

IntegerizeConv = load("integerize_conv")
XS, WS, YS = np.float32(0.02), np.float32(0.01), np.float32(0.05)
PLAIN = "c = Conv(a, b)"
law = settings(max_examples=80, deadline=None)


def graph(inputs: str, body: str = PLAIN, *, y: str = "uint8", axis: int = 0, **given_: Any) -> Any:
    """The node `body` of a and b, the dequantized x and w; its result c is quantized to `y`."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({y} q) {{
            a = DequantizeLinear(x, xs, xz)
            b = DequantizeLinear<axis = {axis}>(w, ws, wz)
            {body}
            q = QuantizeLinear(c, ys, yz)
        }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    constants = {"xs": XS, "xz": np.uint8(7), "ws": WS, "wz": np.int8(0), "ys": YS}
    for name, values in (constants | {"yz": np.zeros((), y)} | given_).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def lower(model: gs.Graph) -> list[str]:
    """Lower; doing so again must change nothing. Returns why something remains."""
    ctx = Context(facts={"complete"})
    first, second = run(model, [IntegerizeConv()] * 2, ctx, [well_formed])
    assert second.changes == 0
    assert second.skipped == first.skipped == first.remaining
    return [why for _, why in first.skipped]


def lowered(*arguments: Any, **options: Any) -> gs.Graph:
    model = graph(*arguments, **options)
    assert lower(model) == []
    assert prove(model) == []
    assert "ConvInteger" in [node.op for node in model.nodes]
    assert [t.name for t in model.outputs] == ["q"]
    return model


def outputs(model: gs.Graph, **feeds: Any) -> Any:
    return Session(model_from_graph(model), threads=1).run(feeds, ["q"])["q"]


def integers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> npt.NDArray[Any]:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(dtype)


def convolved(
    x: Any,
    w: Any,
    group: int = 1,
    strides: tuple[int, ...] = (1,),
    dilations: tuple[int, ...] = (1,),
    pads: tuple[tuple[int, int], ...] = ((0, 0),),
) -> Any:
    """Sums of products over all taps; x [n, c, ...] without its zero point, w [m, c / group, ...].

    `pads` are elements of real 0 before and behind each spatial axis.
    """
    x = np.pad(x, ((0, 0), (0, 0), *pads))
    windows = zip(x.shape[2:], w.shape[2:], dilations, strides, strict=True)
    sizes = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in windows]
    m = len(w) // group
    total = np.zeros((len(x), len(w), *sizes), np.int64)
    for tap in product(*map(range, w.shape[2:])):
        steps = zip(tap, dilations, strides, sizes, strict=True)
        index: Any = (..., *(slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in steps))
        taken = x[index]
        c, at = w.shape[1], (..., *tap)
        for g in range(group):
            rows, columns = slice(g * m, g * m + m), slice(g * c, g * c + c)
            total[:, rows] += np.einsum("nc...,mc->nm...", taken[:, columns], w[rows][at])
    return total


def reference(
    acc: Any, units: Any, y: str, zero_point: int, bias: Any = None, off: float = 0.0
) -> Any:
    """What the law says of sums [n, m, ...] in `units`, scalar or [m]; the bias is real, [m].

    Multipliers are moved by `off`, relative.
    """
    grid, shape = GRIDS[y], (-1, *(1,) * (acc.ndim - 2))
    units = np.broadcast_to(np.asarray(units, np.float64), acc.shape[1:2]).reshape(shape)
    # The bias is rounded as onnxruntime rounds it: in float32.
    steps = 0 if bias is None else np.rint(bias.reshape(shape) / units.astype(np.float32))
    found = dyadic(units / np.float64(YS), 62 - grid.bits)
    found = Dyadic(found.b + np.fix(found.b * off).astype(np.int64), found.c)
    ends = {"low": grid.low, "high": grid.high}
    return requantize(acc, found, bias=steps, zero_point=zero_point, **ends)


LAYERS = {
    "c = Conv(a, b, bias)": (0, 255),
    "s = Conv(a, b, bias) c = Relu(s)": (90, 255),
    "s = Conv(a, b, bias) c = Clip(s, low, high)": (70, 130),
    "s = Conv(a, b, bias) c = Clip(s, , high)": (0, 130),
    "s = Conv(a, b, bias) c = Clip(s)": (0, 255),
}


@pytest.mark.parametrize("body", LAYERS)
def test_a_layer_becomes_one_product_and_a_requantisation(body: str) -> None:
    w, scales = integers((6, 4, 3), "int8"), np.linspace(0.001, 0.02, 6, dtype=np.float32)
    bias = np.linspace(-2, 2, 6, dtype=np.float32)
    given_: dict[str, Any] = {
        "w": w,
        "ws": scales,
        "wz": np.zeros(6, np.int8),
        "yz": np.uint8(90),
        "bias": bias,
    }
    given_ |= {"low": np.float32(-1), "high": np.float32(2)}
    model = lowered("uint8[n, 4, t] x", body, **given_)
    assert [n.op for n in model.nodes] == ["ConvInteger", "Mul", "Add", "Div", "Clip", "Cast"]
    x = integers((3, 4, 50), "uint8")
    acc = convolved(x.astype(np.int64) - 7, w.astype(np.int64))
    expected = np.clip(reference(acc, XS * scales.astype(float), "uint8", 90, bias), *LAYERS[body])
    result = outputs(model, x=x)
    np.testing.assert_array_equal(result, expected)
    # Floats round ties to even, and sum the bias unrounded: few elements differ, by one step.
    moved = result.astype(int) - outputs(graph("uint8[n, 4, t] x", body, **given_), x=x)
    assert np.abs(moved).max() <= 1
    assert (moved != 0).mean() < 0.02


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """Attributes of a convolution over one or two axes, and the shapes of its operands."""
    rank = draw(st.integers(1, 2))
    each = st.tuples(*[st.integers(1, 3)] * rank)
    group = draw(st.integers(1, 3))
    channels, results = group * draw(st.integers(1, 3)), group * draw(st.integers(1, 3))
    kernel, dilations = draw(each), draw(each)
    pads = draw(st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * rank))
    return {
        "group": group,
        "strides": draw(each),
        "dilations": dilations,
        "pads": pads,
        "x": (2, channels, *((k - 1) * d + 3 for k, d in zip(kernel, dilations, strict=True))),
        "w": (results, channels // group, *kernel),
    }


BYTES, GRID_NAMES = st.sampled_from(["int8", "uint8"]), st.sampled_from(sorted(GRIDS))


@law
@given(st.data(), layers(), GRID_NAMES, BYTES, GRID_NAMES, st.booleans())
def test_any_convolution_is_exact(
    data: st.DataObject, layer: dict[str, Any], x_type: str, w_type: str, y: str, biased: bool
) -> None:
    x, w = integers(layer["x"], x_type), integers(layer["w"], w_type, 1)
    points = (data.draw(st.integers(np.iinfo(t).min, np.iinfo(t).max)) for t in (x_type, w_type, y))
    xz, wz, yz = points
    channels = len(w) if data.draw(st.booleans()) else 1
    scales = np.geomspace(0.0005, 0.05, channels, dtype=np.float32)
    given_: dict[str, Any] = {"w": w, "ws": scales, "wz": np.full(channels, wz, w_type)}
    if channels == 1:
        given_ = {"w": w, "ws": scales[0], "wz": np.asarray(wz, w_type)}
    xs = XS / np.float32(1 if GRIDS[x_type].bits == 8 else 256)
    given_ |= {"xs": xs, "xz": np.asarray(xz, x_type), "yz": np.asarray(yz, y)}
    bias = np.linspace(-3, 3, len(w), dtype=np.float32) if biased else None
    given_ |= {} if bias is None else {"bias": bias}
    flat = [p for pads in zip(*layer["pads"], strict=True) for p in pads]
    attrs = {"group": layer["group"], "pads": flat}
    attrs |= {"strides": [*layer["strides"]], "dilations": [*layer["dilations"]]}
    options = ", ".join(f"{name} = {value}" for name, value in attrs.items())
    body = f"c = Conv<{options}>(a, b{', bias' if biased else ''})"
    model = lowered(f"{x_type}[{', '.join(map(str, x.shape))}] x", body, y=y, **given_)
    factors = x.astype(np.int64) - xz, w.astype(np.int64) - wz
    rest = (layer[name] for name in ("group", "strides", "dilations", "pads"))
    acc = convolved(*factors, *rest)
    result, units = outputs(model, x=x), xs * scales.astype(float)
    # One channel in 10,000 has a multiplier that is off by so little; the others are exact.
    around = [reference(acc, units, y, yz, bias, off) for off in (-PRECISION, 0, PRECISION)]
    assert (np.min(around, axis=0) <= result).all()
    assert (result <= np.max(around, axis=0)).all()
    assert (result != around[1]).sum() <= 1


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("x_type", sorted(GRIDS))
def test_padding_chosen_by_the_runtime_is_real_zero(mode: str, x_type: str) -> None:
    w, x = integers((5, 2, 4), "int8"), integers((1, 2, 9), x_type)
    given_: dict[str, Any] = {"w": w, "xz": np.asarray(100, x_type), "yz": np.uint8(128)}
    xs = XS / np.float32(1 if GRIDS[x_type].bits == 8 else 256)
    given_["xs"] = xs
    body = f'c = Conv<auto_pad = "{mode}">(a, b)'
    model = lowered(f"{x_type}[1, 2, 9] x", body, **given_)
    pads = {"SAME_UPPER": (1, 2), "SAME_LOWER": (2, 1), "VALID": (0, 0)}[mode]
    acc = convolved(x.astype(np.int64) - 100, w.astype(np.int64), pads=(pads,))
    expected = reference(acc, xs.astype(float) * WS, "uint8", 128)
    np.testing.assert_array_equal(outputs(model, x=x), expected)


@pytest.mark.parametrize("y", GRIDS)
@pytest.mark.parametrize("fill", [0, 255])
def test_the_largest_sums_are_exact(y: str, fill: int) -> None:
    x = np.full((1, 1024, 3), fill, np.uint8)
    w = np.tile(np.array([-128, 127, 0], np.int8)[:, None, None], (1, 1024, 1))
    bias = np.array([-5, 5, 0.3], np.float32) * 128
    given_ = {"w": w, "xz": np.uint8(255 - fill), "ys": np.float32(1), "bias": bias}
    model = lowered("uint8[1, 1024, t] x", "c = Conv(a, b, bias)", y=y, **given_)
    acc = convolved(x.astype(np.int64) - 255 + fill, w.astype(np.int64))
    assert np.abs(acc).max() == 1024 * 255 * 128
    units = XS.astype(float) * WS
    summed = acc + np.rint(bias / np.float32(units))[:, None]
    ends = GRIDS[y].low, GRIDS[y].high
    np.testing.assert_array_equal(
        outputs(model, x=x), np.clip(np.floor(summed * units + 0.5), *ends)
    )


def test_dead_channels_keep_their_bias() -> None:
    """Weights of zero, or a scale so small that no product counts: the bias alone is left."""
    w = np.stack([np.zeros((2, 3)), np.full((2, 3), -128), np.ones((2, 3))]).astype(np.int8)
    scales, bias = (np.array(v, np.float32) for v in ([0.01, 1e-12, 0.01], [1, 0, 0]))
    given_ = {"w": w, "ws": scales, "wz": np.zeros(3, np.int8), "bias": bias, "yz": np.uint8(9)}
    model = lowered("uint8[1, 2, 5] x", "c = Conv(a, b, bias)", **given_)
    result = outputs(model, x=integers((1, 2, 5), "uint8"))
    assert (result[:, 0] == 9 + 20).all()  # 1.0 in steps of 0.05
    assert (result[:, 1] == 9).all()


def test_weights_beyond_int8_are_stored_by_their_own_zero_point() -> None:
    w, x = integers((3, 2, 2), "uint8"), integers((1, 2, 9), "uint8")
    for zero_point in (0, 200, 255):
        given_ = {"w": w, "wz": np.uint8(zero_point), "yz": np.uint8(99)}
        model = lowered("uint8[1, 2, 9] x", **given_)
        centred = w.astype(np.int64) - zero_point
        acc = convolved(x.astype(np.int64) - 7, centred)
        expected = reference(acc, XS.astype(float) * WS, "uint8", 99)
        np.testing.assert_array_equal(outputs(model, x=x), expected)


def test_shared_weights_are_stored_once_and_results_may_have_many_readers() -> None:
    given_: dict[str, Any] = {"w": integers((4, 4, 1), "int8"), "yz": np.uint8(100)}
    body = """h = Conv(a, b) hq = QuantizeLinear(h, ys, yz) d = DequantizeLinear(hq, ys, yz)
        e = DequantizeLinear(hq, ys, yz) s = Conv(d, b) sq = QuantizeLinear(s, ys, yz)
        t = DequantizeLinear(sq, ys, yz) c = Conv(e, b)"""
    model = graph("uint8[1, 4, 6] x", body, **given_)
    before = outputs(model, x=integers((1, 4, 6), "uint8"))
    assert lower(model) == []
    assert prove(model) == []
    convolutions = [n for n in model.nodes if n.op == "ConvInteger"]
    # Nobody reads the second one's result: it is gone.
    assert len(convolutions) == 2
    assert convolutions[0].inputs[1] is convolutions[1].inputs[1]
    after = outputs(model, x=integers((1, 4, 6), "uint8"))
    assert np.abs(after.astype(int) - before).max() <= 1


def test_results_may_be_empty() -> None:
    model = lowered("uint8[n, 2, t] x", w=integers((3, 2, 1), "int8"))
    assert outputs(model, x=np.zeros((0, 2, 5), np.uint8)).shape == (0, 3, 5)


WEIGHT: dict[str, Any] = {"w": np.ones((3, 2, 2), np.int8)}
FLOATS = np.ones(3, np.float32)
WIDE = np.array([[[250]] * 2, [[0]] * 2], np.uint8)
DECLINED: list[tuple[str, str, dict[str, Any], str]] = [
    ("uint8[1, 2, 5] x, float[3] f", "c = Conv(a, b, f)", {}, "its bias is computed at run time"),
    ("uint8[1, 2, 5] x", "c = Conv(a, f)", {"f": np.ones((3, 2, 1), np.float32)}, "its weight 'f'"),
    ("uint8[1, 2, 5] x, float[1, 2, 5] f", "c = Conv(f, b)", {}, "its input 'f' is not quantized"),
    (
        "uint8[1, 2, 5] x",
        PLAIN,
        {"ws": FLOATS[:2], "wz": np.zeros(2, np.int8), "axis": 1},
        "its weight has scales along another axis than output channels",
    ),
    (
        "uint8[1, 2, 5] x",
        PLAIN,
        {"w": WIDE, "ws": FLOATS[:2], "wz": np.array([0, 255], np.uint8)},
        "its weights span -255..250, over 8 bits",
    ),
    (
        "uint8[1, 2, 5] x",
        "c = Conv(a, b, f)",
        {"f": FLOATS * 1e9},
        "its bias exceeds 32 bits in steps of input scale x weight scale",
    ),
    (
        "uint8[1, 34000, 5] x",
        PLAIN,
        {"w": np.full((1, 34000, 1), 255, np.uint8), "wz": np.uint8(0)},
        "an accumulator exceeds 32 bits",
    ),
    (
        "uint16[1, 34000, 5] x",
        PLAIN,
        {"w": np.full((1, 34000, 1), 255, np.uint8), "wz": np.uint8(0), "xz": np.uint16(0)},
        "an accumulator exceeds 32 bits",
    ),
    (
        "int16[1, 2, 5] x",
        "c = Conv(a, b, f)",
        {"f": FLOATS * 2e8, "xz": np.int16(0)},
        "its bias exceeds 40 bits in steps of input scale x weight scale",
    ),
    ("uint8[1, 2, 5] x", PLAIN, {"xs": np.float32(1e20)}, "a requantisation by"),
    (
        "uint8[1, 2, 5] x",
        "c = Conv(a, b) r = QuantizeLinear(c, ys, yz)",
        {},
        "its result is not quantized once",
    ),
    (
        "uint8[1, 2, 5] x, float s",
        "d = Conv(a, b) r = QuantizeLinear(d, s, yz) c = DequantizeLinear(r, s, yz)",
        {},
        "its result has no single constant scale",
    ),
]


@pytest.mark.parametrize(("inputs", "body", "constants", "why"), DECLINED)
def test_declines_with_the_reason(
    inputs: str, body: str, constants: dict[str, Any], why: str
) -> None:
    model = graph(inputs, body, **WEIGHT | constants)
    before = len(model.nodes)
    (found,) = lower(model)
    assert found.startswith(why)
    assert len(model.nodes) == before


def test_declines_a_weight_that_is_no_constant() -> None:
    model = graph("uint8[1, 2, 5] x, int8[3, 2, 2] w")
    assert lower(model) == ["its weight 'b' is no constant with scales per channel"]
