from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.grid import dyadic, requantize
from onnx_intq.integer_only import prove
from onnx_intq.lowering import GRIDS
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

IntegerizeConvTranspose = load("integerize_conv_transpose")
RANDOM = np.random.default_rng(0)
XS, YS = np.float32(0.02), np.float32(0.05)
law = settings(max_examples=60, deadline=None)


def graph(inputs: str, attrs: str, y: str = "int8", *, axis: int = 1, **constants: Any) -> gs.Graph:
    """ConvTranspose<attrs> of the dequantized x and w; the result is quantized to `y`."""
    bias = ", f" if "f" in constants or " f" in inputs else ""
    result, activation = ("r", "c = Relu(r)") if constants.pop("relu", False) else ("c", "")
    options = f"<{attrs}>" if attrs else ""
    last = f"{result} = ConvTranspose{options}(a, b{bias}) {activation}"
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({y} q) {{
            a = DequantizeLinear(x, xs, xz)
            b = DequantizeLinear<axis = {axis}>(w, ws, wz)
            {last}
            q = QuantizeLinear(c, ys, yz)
        }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    constants = {"xs": XS, "xz": np.uint8(9), "ys": YS, "yz": np.zeros((), y)} | constants
    for name, values in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def lower(model: gs.Graph) -> list[str]:
    """Lower; doing so again must change nothing. Returns why something remains."""
    ctx = Context(facts={"complete"})
    first, second = run(model, [IntegerizeConvTranspose()] * 2, ctx, [well_formed])
    assert second.changes == 0
    assert second.skipped == first.skipped
    assert first.changes + len(first.skipped) == 1
    assert ctx.remaining == ctx.skipped
    return [why for _, why in first.skipped]


def lowered(*arguments: Any, **options: Any) -> gs.Graph:
    model = graph(*arguments, **options)
    assert lower(model) == []
    assert prove(model) == []
    return model


def outputs(model: gs.Graph | onnx.ModelProto, **feeds: Any) -> Any:
    proto = model_from_graph(model) if isinstance(model, gs.Graph) else model
    (result,) = Session(proto, threads=1).run(feeds).values()
    return result


def integers(shape: Any, dtype: str) -> Any:
    info = np.iinfo(dtype)
    return RANDOM.integers(info.min, info.max + 1, shape).astype(dtype)


def sums(x: Any, w: Any, attrs: str) -> Any:
    """The exact sums, by onnxruntime in float: below 2^24 every integer is a float32."""
    if np.abs(x).max(initial=0) >= 1 << 9:
        return 256 * sums(x >> 8, w, attrs) + sums(x & 255, w, attrs)
    inputs = f"float{list(x.shape)} x, float{list(w.shape)} w"
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g ({inputs}) => (float y) {{ y = ConvTranspose<{attrs}>(x, w) }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    found = outputs(model, x=x.astype(np.float32), w=w.astype(np.float32))
    assert np.abs(found).max(initial=0) < 1 << 24
    exact: Any = found.astype(np.int64)
    return exact


def reference(acc: Any, units: Any, y: str, bias: Any = 0, zero_point: int = 0) -> Any:
    grid, steps = GRIDS[y], np.rint(bias / np.asarray(units, np.float64)).astype(np.int64)
    limits = {"low": grid.low, "high": grid.high}
    multiplier = dyadic(units / np.float64(YS), 62 - grid.bits)
    return requantize(acc, multiplier, bias=steps, zero_point=zero_point, **limits)


AXIS = st.fixed_dictionaries({
    "kernel": st.integers(1, 4),
    "stride": st.integers(1, 3),
    "dilation": st.integers(1, 2),
    "extra": st.integers(0, 2),
    "begin": st.integers(0, 4),
    "end": st.integers(0, 4),
    "size": st.integers(3, 6),
})  # fmt: skip
BYTES = st.sampled_from(["int8", "uint8"])


def attributes(axes: list[dict[str, int]], groups: int, mode: str) -> str:
    kernel, strides, dilations = ([a[k] for a in axes] for k in ("kernel", "stride", "dilation"))
    if mode.startswith("SAME"):  # others are declined
        strides = [
            min(s, (k - 1) * d + 1) for s, k, d in zip(strides, kernel, dilations, strict=True)
        ]
    # What onnxruntime takes: extras below the stride, ends inside the full result.
    extra = [min(a["extra"], stride - 1) for a, stride in zip(axes, strides, strict=True)]
    extra = [0] * len(axes) if mode.startswith("SAME") else extra
    room = [(a["size"] - 1) * a["stride"] + (a["kernel"] - 1) * a["dilation"] for a in axes]
    pads = [min(a[p], r // 2) for p in ("begin", "end") for a, r in zip(axes, room, strict=True)]
    padding = f'auto_pad = "{mode}"' if mode else f"pads = {pads}"
    return (
        f"kernel_shape = {kernel}, strides = {strides}, dilations = {dilations}, "
        f"output_padding = {extra}, group = {groups}, {padding}"
    )


@law
@given(
    st.lists(AXIS, min_size=1, max_size=2),
    st.sampled_from([(1, 2, 3), (2, 4, 2), (3, 3, 1), (2, 2, 3)]),
    st.sampled_from(["", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    st.tuples(st.sampled_from(sorted(GRIDS)), BYTES, st.sampled_from(sorted(GRIDS))),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_transposed_convolutions_are_exact(
    axes: list[dict[str, int]],
    channels: tuple[int, int, int],
    mode: str,
    types: tuple[str, str, str],
    per_channel: bool,
    dynamic: bool,
    data: st.DataObject,
) -> None:
    groups, inputs, outs = channels
    x_type, w_type, y = types
    attrs = attributes(axes, groups, mode)
    xz, wz = (data.draw(st.integers(np.iinfo(t).min, np.iinfo(t).max)) for t in (x_type, w_type))
    sizes, kernel = [a["size"] for a in axes], [a["kernel"] for a in axes]
    x, w = integers((2, inputs, *sizes), x_type), integers((inputs, outs, *kernel), w_type)
    count = outs if per_channel and outs > 1 else 1
    scales = np.geomspace(0.001, 0.02, count, dtype=np.float32)
    bias = RANDOM.uniform(-1, 1, groups * outs).astype(np.float32)
    given_ = {"w": w, "ws": scales, "wz": np.full(count, wz, w_type), "f": bias}
    if count == 1:
        given_ |= {"ws": scales[0], "wz": np.asarray(wz, w_type)}
    spatial = ["h", "t"][: len(axes)] if dynamic else [str(size) for size in sizes]
    dims = ", ".join(["n", str(inputs), *spatial])
    xs = XS / np.float32(1 if GRIDS[x_type].bits == 8 else 256)
    given_ |= {"xs": xs, "xz": np.asarray(xz, x_type)}
    model = lowered(f"{x_type}[{dims}] x", attrs, y, **given_)
    acc = sums(x.astype(int) - xz, w.astype(int) - wz, attrs)
    ones = (1,) * len(axes)
    units = np.tile(xs.astype(float) * scales, groups * outs // count).reshape(-1, *ones)
    expected = reference(acc, units, y, bias.reshape(-1, *ones))
    np.testing.assert_array_equal(outputs(model, x=x), expected)


def simple(attrs: str, x: str = "int8[n, 3, t] x", **constants: Any) -> gs.Graph:
    """Kernel 3, 3 channels to 2."""
    w = {"w": integers((3, 2, 3), "int8"), "ws": np.float32(0.01), "wz": np.int8(0)}
    return graph(x, attrs, xz=np.asarray(-7, x.split("[")[0]), **w | constants)


def test_a_stride_is_stretched_with_the_zero_point() -> None:
    model = simple("strides = [2], pads = [1, 1]")
    assert lower(model) == []
    found = [node.op for node in model.nodes]
    assert found[:5] == ["Unsqueeze", "Pad", "Reshape", "ConvInteger", "Mul"]
    assert not any(node.op == "Slice" for node in model.nodes)
    model = simple("")
    assert lower(model) == []
    assert model.nodes[0].op == "ConvInteger"


@pytest.mark.parametrize("mode", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", [8, 9, 10])
def test_an_output_shape_is_reached_by_cutting(mode: str, size: int) -> None:
    attrs = f'strides = [2], output_shape = [{size}], auto_pad = "{mode}"'
    w, x = integers((3, 2, 3), "int8"), integers((2, 3, 5), "int8")
    model = simple(attrs, "int8[2, 3, 5] x", w=w)
    assert lower(model) == []
    acc = sums(x.astype(int) + 7, w.astype(int), attrs)
    assert acc.shape == (2, 2, size)
    np.testing.assert_array_equal(
        outputs(model, x=x), reference(acc, XS.astype(float) * np.float32(0.01), "int8")
    )


@pytest.mark.parametrize(("axis", "groups"), [(0, 3), (1, 3), (1, 1)])
def test_scales_follow_the_outputs(axis: int, groups: int) -> None:
    """Along inputs, scales are those of outputs only where every input has its own."""
    w = integers((3, 2, 4), "int8")
    count = w.shape[axis]
    scales = np.geomspace(0.001, 0.01, count, dtype=np.float32)
    given_ = {"w": w, "ws": scales, "wz": np.zeros(count, np.int8)}
    model = lowered("uint8[2, 3, 5] x", f"group = {groups}, strides = [2]", axis=axis, **given_)
    x = integers((2, 3, 5), "uint8")
    acc = sums(x.astype(int) - 9, w.astype(int), f"group = {groups}, strides = [2]")
    outs = np.repeat(scales, 2) if axis == 0 else np.tile(scales, groups)
    expected = reference(acc, XS.astype(float) * outs[:, None], "int8")
    np.testing.assert_array_equal(outputs(model, x=x), expected)


@pytest.mark.parametrize("fill", [-128, 127])
@pytest.mark.parametrize("y", GRIDS)
def test_the_largest_sums_are_exact(fill: int, y: str) -> None:
    x, w = np.full((1, 64, 4), fill, np.int8), np.full((64, 2, 8), -128, np.int8)
    given_ = {"w": w, "ws": np.float32(0.01), "wz": np.int8(0), "xz": np.int8(-1 - fill)}
    model = lowered("int8[1, 64, t] x", "strides = [2]", y, **given_)
    acc = sums(x.astype(int) + 1 + fill, w.astype(int), "strides = [2]")
    assert np.abs(acc).max() > 255 * 128 * 64
    expected = reference(acc, XS.astype(float) * np.float32(0.01), y)
    np.testing.assert_array_equal(outputs(model, x=x), expected)


def test_an_activation_and_a_bias_go_into_the_requantisation() -> None:
    given_ = {"f": np.array([-3, 2], np.float32), "w": integers((3, 2, 3), "int8")}
    model, before = (simple("strides = [2]", relu=True, **given_) for _ in range(2))
    assert lower(model) == []
    assert prove(model) == []
    x = integers((4, 3, 50), "int8")
    moved = outputs(model, x=x).astype(int) - outputs(before, x=x)
    # The bias is rounded to steps of the sums, 0.004 of the result's: 1 in 100 is near a half.
    assert np.abs(moved).max() <= 1
    assert (moved != 0).mean() < 0.02
    assert outputs(model, x=x).min() == 0


DECLINED: list[tuple[str, str, dict[str, Any], str]] = [
    ("", "int8[n, 3, t] x, float[2] f", {}, "its bias is computed at run time"),
    (
        "",
        "int8[n, 3, t] x",
        {"ws": np.ones(3, np.float32), "wz": np.zeros(3, np.int8), "axis": 0},
        "its weight has scales along another axis",
    ),
    (
        'strides = [2], output_padding = [1], auto_pad = "SAME_UPPER"',
        "int8[n, 3, t] x",
        {},
        "it has",
    ),
    ("output_shape = [9]", "int8[n, 3, t] x", {}, "its output_shape needs an input of fixed size"),
    ("output_shape = [9]", "int8[n, 3, 4] x", {}, "its result is to be longer"),
    ('strides = [4], auto_pad = "SAME_UPPER"', "int8[n, 3, 4] x", {}, "its result is to be longer"),
]


@pytest.mark.parametrize(("attrs", "inputs", "constants", "why"), DECLINED)
def test_declines_with_the_reason(
    attrs: str, inputs: str, constants: dict[str, Any], why: str
) -> None:
    model = simple(attrs, inputs, **constants)
    before = len(model.nodes)
    (found,) = lower(model)
    assert found.startswith(why)
    assert len(model.nodes) == before


@pytest.mark.parametrize("per_channel", [False, True])
def test_lowers_what_onnxruntime_quantized(foreign: Any, per_channel: bool) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 3, t] x) => (float[n, 2, u] y) {
        y = ConvTranspose<strides = [2], pads = [1, 1], output_padding = [1]>(x, w, f) }"""
    model = onnx.parser.parse_model(text)
    for name, shape in {"w": (3, 2, 3), "f": (2,)}.items():
        values = RANDOM.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    x = RANDOM.standard_normal((20, 3, 50)).astype(np.float32)
    quantized = foreign(model, [{"x": x}], per_channel=per_channel)
    before, ctx = outputs(quantized, x=x), Context(facts={"quantized"})
    run(quantized, parse("complete_qdq, integerize_conv_transpose"), ctx, [well_formed])
    assert not ctx.remaining
    assert prove(quantized) == []
    step = float(quantized.outputs[0].inputs[0].inputs[1].values)
    moved = np.abs(outputs(quantized, x=x) - before)
    assert moved.max() <= step * (1 + 1e-5)
    assert (moved > step / 2).mean() < 0.01
