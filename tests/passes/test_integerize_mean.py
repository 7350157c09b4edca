import math
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
from onnx_intq.kernels.average import average
from onnx_intq.lowering import GRIDS
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

IntegerizeMean = load("integerize_mean")
RANDOM = np.random.default_rng(0)
XS, YS = np.float32(0.02), np.float32(0.0031)
FRACTION_BITS = 12
law = settings(max_examples=60, deadline=None)
TYPES = st.sampled_from(sorted(GRIDS))


def graph(
    inputs: str, body: str, y: str = "int8", zeros: Any = (0, 0), **constants: Any
) -> gs.Graph:
    """The nodes `body` of a, the dequantized x; their result c is quantized to `y`."""
    x = inputs.split("[")[0]
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({y} q) {{
            a = DequantizeLinear(x, xs, xz) {body} q = QuantizeLinear(c, ys, yz)
        }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    constants = {"xs": XS, "ys": YS} | constants
    constants |= {"xz": np.asarray(zeros[0], x), "yz": np.asarray(zeros[1], y)}
    for name, values in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def lower(model: gs.Graph) -> list[str]:
    """Lower; doing so again must change nothing. Returns why something remains."""
    ctx = Context(facts={"complete"})
    first, second = run(model, [IntegerizeMean()] * 2, ctx, [well_formed])
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


def ops(model: gs.Graph) -> list[str]:
    return [node.op for node in model.nodes]


def outputs(model: gs.Graph, **feeds: Any) -> Any:
    (result,) = Session(model_from_graph(model), threads=1).run(feeds).values()
    return result


def integers(shape: Any, dtype: str) -> Any:
    info = np.iinfo(dtype)
    return RANDOM.integers(info.min, info.max + 1, shape).astype(dtype)


def rounded(acc: Any, factor: Any, y: str, zero_point: int = 0) -> Any:
    grid = GRIDS[y]
    limits = {"low": grid.low, "high": grid.high}
    return requantize(acc, dyadic(factor, 62 - grid.bits), zero_point=zero_point, **limits)


def over_dynamic(total: Any, count: Any, factor: float, y: str, zero_point: int) -> Any:
    """What the law says of means over a length that is not fixed."""
    means = average(total, count, FRACTION_BITS)
    return rounded(means, factor * 2.0**-FRACTION_BITS, y, zero_point)


REDUCED: dict[str, tuple[str, tuple[int, ...], bool]] = {
    "all axes": ("ReduceMean<keepdims = 0>(a)", (0, 1, 2), False),
    "last": ("ReduceMean(a, last)", (2,), True),
    "first and last": ("ReduceMean<keepdims = 0>(a, ends)", (0, 2), False),
    "spatial": ("GlobalAveragePool(a)", (2,), True),
    "sum": ("ReduceSum(a, last)", (2,), True),
    "sum of all": ("ReduceSum(a)", (0, 1, 2), True),
}
AXES = {"last": np.array([-1], np.int64), "ends": np.array([2, 0], np.int64)}


@law
@given(st.sampled_from(sorted(REDUCED)), TYPES, TYPES, st.booleans(), st.data())
def test_means_and_sums(name: str, x_type: str, y: str, dynamic: bool, data: st.DataObject) -> None:
    body, axes, keep = REDUCED[name]
    xz, yz = (data.draw(st.integers(np.iinfo(t).min, np.iinfo(t).max)) for t in (x_type, y))
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    used = {key: v for key, v in AXES.items() if key in body}
    ys = YS * 100 if "sum" in name else YS
    dims = "n, c, t" if dynamic else ", ".join(map(str, shape))
    model = lowered(f"{x_type}[{dims}] x", f"c = {body}", y, (xz, yz), ys=ys, **used)
    x = integers(shape, x_type)
    total = (x.astype(np.int64) - xz).sum(axis=axes, keepdims=keep)
    count = math.prod(shape[axis] for axis in axes)
    factor = float(XS) / float(ys)
    if "sum" in name:
        expected = rounded(total, factor, y, yz)
    elif dynamic:
        expected = over_dynamic(total, count, factor, y, yz)
    else:
        expected = rounded(total, float(XS) / (count * float(ys)), y, yz)
    result = outputs(model, x=x)
    np.testing.assert_array_equal(result, expected)
    exact = total / (1 if "sum" in name else count) * factor + yz
    assert (np.abs(result - np.clip(exact, GRIDS[y].low, GRIDS[y].high)) <= 0.5 + 2.0**-10).all()


@pytest.mark.parametrize("x_type", GRIDS)
@pytest.mark.parametrize("dims", ["n, c, t", "40000, 1, 2"])
@pytest.mark.parametrize("ys", [XS / 64, XS * 40000])
def test_sums_of_the_largest_values(x_type: str, dims: str, ys: Any) -> None:
    """Results far inside and far outside of the grid; sums above and below 2^31."""
    model = lowered(f"{x_type}[{dims}] x", "c = ReduceSum(a)", "int16", ys=np.float32(ys))
    for fill in (np.iinfo(x_type).min, np.iinfo(x_type).max, 0):
        x = np.full((40000, 1, 2), fill, x_type)
        exact = round(fill * 80000 * float(XS) / float(np.float32(ys)))
        assert outputs(model, x=x).item() == min(max(exact, -32768), 32767)


def test_a_mean_of_many_large_values() -> None:
    model = lowered("int16[40000] x", "c = ReduceMean(a)", "int16", zeros=(32767, 0), ys=XS)
    for fill in (-32768, 32767):
        x = np.full(40000, fill, np.int16)
        assert outputs(model, x=x).item() == max(fill - 32767, -32768)


def test_the_mean_of_nothing_is_no_error() -> None:
    """onnxruntime stops at an integer division by 0."""
    model = lowered("int8[n, t] x", "c = ReduceMean(a, last)", zeros=(5, -7), last=AXES["last"])
    assert (outputs(model, x=np.zeros((2, 0), np.int8)) == -7).all()


def test_a_fixed_mean_is_a_sum_and_a_requantisation() -> None:
    model = lowered("int8[n, 4] x", "c = ReduceMean(a, last)", last=AXES["last"])
    assert ops(model)[:2] == ["Cast", "ReduceSum"]
    assert set(ops(model)[2:]) <= {"Mul", "Add", "Div", "Clip", "Cast"}


def test_an_activation_limits_the_integers() -> None:
    for dims in ("n, 4", "n, t"):
        body = "m = ReduceMean(a, last) c = Relu(m)"
        model = lowered(f"int8[{dims}] x", body, zeros=(0, -100), last=AXES["last"])
        x = np.full((1, 4), -10, np.int8)
        assert outputs(model, x=x).item() == -100
        assert outputs(model, x=-x).item() == round(10 * XS / YS) - 100


POOLS = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 1), st.integers(0, 1)
)
MODES = st.sampled_from(["", "SAME_UPPER", "SAME_LOWER", "VALID"])


def windows(axes: list[Any], mode: str, include: bool, dynamic: bool) -> str:
    kernel, strides, dilations, begin, end = (list(v) for v in zip(*axes, strict=True))
    pads = [min(p, k - 1) for places in (begin, end) for p, k in zip(places, kernel, strict=True)]
    if mode.startswith("SAME"):
        dilations = [1] * len(axes)  # others are declined
        strides = [1 if dynamic or k < s else s for k, s in zip(kernel, strides, strict=True)]
    padding = f'auto_pad = "{mode}"' if mode else f"pads = {pads}"
    return (
        f"AveragePool<kernel_shape = {kernel}, strides = {strides}, dilations = {dilations}, "
        f"{padding}, count_include_pad = {int(include)}>(a)"
    )


@law
@given(
    st.lists(POOLS, min_size=1, max_size=2), TYPES, TYPES, MODES, *[st.booleans()] * 3, st.data()
)
def test_means_of_windows(
    axes: list[Any],
    x_type: str,
    y: str,
    mode: str,
    include: bool,
    dynamic: bool,
    channels: bool,
    data: st.DataObject,
) -> None:
    xz, yz = (data.draw(st.integers(np.iinfo(t).min, np.iinfo(t).max)) for t in (x_type, y))
    body, sizes = windows(axes, mode, include, dynamic), [7, 6][: len(axes)]
    spatial = ["h", "w"][: len(axes)] if dynamic else [str(size) for size in sizes]
    inputs = f"{x_type}[{', '.join(['2', '3' if channels else 'c', *spatial])}] x"
    ys = np.float32(0.013)
    model = lowered(inputs, f"c = {body}", y, (xz, yz), ys=ys)
    x = integers((2, 3, *sizes), x_type)
    dims = ", ".join(map(str, x.shape))
    pool = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[{dims}] a) => (float c) {{ c = {body} }}"""
    )
    pool.graph.output[0].type.tensor_type.ClearField("shape")
    (means,) = Session(pool).run({"a": (x.astype(np.float32) - xz)}).values()
    exact = np.clip(means.astype(float) * XS / ys + yz, GRIDS[y].low, GRIDS[y].high)
    # Half a step, a mean in steps of 2^-12, and onnxruntime's sums and division in float32.
    error = 0.5 + 2.0**-13 * XS / ys + np.abs(means * XS / ys) * 9 * 2.0**-24
    assert (np.abs(outputs(model, x=x) - exact) <= error).all()


@pytest.mark.parametrize("x_type", ["int8", "uint8", "int16"])
def test_windows_of_fixed_counts_are_rounded_once(x_type: str) -> None:
    body = "c = AveragePool<kernel_shape = [3], strides = [2], pads = [1, 1]>(a)"
    model = lowered(f"{x_type}[n, 3, 8] x", body, "int8", (7, -3))
    x = integers((2, 3, 8), x_type)
    padded = np.pad(x.astype(np.int64) - 7, ((0, 0), (0, 0), (1, 1)))
    total = np.stack([padded[..., i : i + 7 : 2] for i in range(3)]).sum(axis=0)
    factor = float(XS) / (np.array([2, 3, 3, 3]) * float(YS))
    np.testing.assert_array_equal(outputs(model, x=x), rounded(total, factor, "int8", -3))


def test_eight_bits_are_pooled_by_a_convolution_with_ones() -> None:
    body = "c = AveragePool<kernel_shape = [3], strides = [2]>(a)"
    assert ops(lowered("int8[n, 3, t] x", body))[0] == "ConvInteger"
    assert "Slice" in ops(lowered("int8[n, c, t] x", body))
    assert "Slice" in ops(lowered("int16[n, 3, t] x", body))


DECLINED = [
    ("int8[n, 4] x", "c = ReduceMean<noop_with_empty_axes = 1>(a)", "it has no axes"),
    (
        "int8[1, 2, 6] x",
        'c = AveragePool<kernel_shape = [1], strides = [3], auto_pad = "SAME_UPPER">(a)',
        "it has auto_pad with strides that leave elements out",
    ),
    ("int8[1, 2, 4] x", "c = AveragePool<kernel_shape = [3], ceil_mode = 1>(a)", "it rounds"),
]


@pytest.mark.parametrize(("inputs", "body", "why"), DECLINED)
def test_declines_with_the_reason(inputs: str, body: str, why: str) -> None:
    model = graph(inputs, body)
    before = len(model.nodes)
    (found,) = lower(model)
    assert found.startswith(why)
    assert len(model.nodes) == before


def test_declines_an_unknown_rank_and_unknown_axes() -> None:
    model, ctx = graph("int8[2, 3] x", "c = ReduceMean(a)"), Context()
    model.tensors()["a"].shape = None
    assert IntegerizeMean().run(model, ctx) == 0
    model = graph("int8[n, 4] x, int64[1] axes", "c = ReduceMean(a, axes)")
    assert IntegerizeMean().run(model, ctx) == 0
    found = [why for _, why in ctx.remaining]
    assert found == ["the rank of its input 'a' is unknown", "its axes are computed at run time"]


@pytest.mark.parametrize("op", ["GlobalAveragePool(c)", "AveragePool<kernel_shape = [3]>(c)"])
def test_lowers_what_onnxruntime_quantized(foreign: Any, op: str) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 3, 8] x) => (float[n, 3, t] y) {{ c = Conv(x, w) y = {op} }}"""
    )
    w = RANDOM.standard_normal((3, 3, 1)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    x = RANDOM.standard_normal((400, 3, 8)).astype(np.float32)
    quantized = foreign(model, [{"x": x}])
    before, ctx = outputs(quantized, x=x), Context(facts={"quantized"})
    run(quantized, parse("complete_qdq, integerize_conv, integerize_mean"), ctx, [well_formed])
    assert not ctx.remaining
    assert prove(quantized) == []
    # 3 elements have no ties, of 8 an 8th has: half of these is rounded down by floats, to even.
    step = float(quantized.outputs[0].inputs[0].inputs[1].values)
    moved = np.abs(outputs(quantized, x=x) - before)
    assert moved.max() <= step * (1 + 1e-5)
    assert (moved > step / 2).mean() < (0.08 if "Global" in op else 0.02)
