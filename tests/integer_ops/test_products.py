"""Convolutions, matrix products, pooling and quantization give onnxruntime's integers."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_intq.interpreter import Interpreter, SideBySide
from onnx_intq.transform import IntqError

Feeds = dict[str, npt.NDArray[Any]]
Draw = Callable[..., Any]
BYTES = ("int8", "uint8")
AUTO_PADS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")

laws = settings(derandomize=True, deadline=None, max_examples=60)


@functools.lru_cache(maxsize=16)
def side_by_side(graph: str) -> SideBySide:
    header = '<ir_version: 10, opset_import: ["" : 21]> g '
    return SideBySide(onnx.parser.parse_model(header + graph))


def array(draw: Draw, dtype: str, *shape: int) -> npt.NDArray[Any]:
    """Integers, the ends of their type more often."""
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    values = st.sampled_from([low, high]) | st.integers(low, high)
    found: npt.NDArray[Any] = draw(hnp.arrays(np.dtype(dtype), shape, elements=values))
    return found


def positive(draw: Draw, *shape: int) -> npt.NDArray[Any]:
    """Scales, float32."""
    values = st.floats(2**-13, 8, width=32)
    found: npt.NDArray[Any] = draw(hnp.arrays(np.dtype(np.float32), shape, elements=values))
    return found


@st.composite
def convolution(draw: st.DrawFn, types: tuple[str, str]) -> tuple[str, Feeds]:
    """Attributes, x and w of a convolution over one to three axes."""
    rank, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inputs, outputs = group * draw(st.integers(1, 3)), group * draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    strides = [draw(st.integers(1, 3)) for _ in range(rank)]
    auto_pad = draw(st.sampled_from(AUTO_PADS))
    # onnxruntime refuses the two together
    dilations = [1 if "SAME" in auto_pad else draw(st.integers(1, 2)) for _ in range(rank)]
    pads = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    spatial = [5 + draw(st.integers(0, 3)) for _ in range(rank)]
    attributes = {"group": group, "strides": strides, "dilations": dilations} | (
        {"pads": pads} if auto_pad == "NOTSET" else {"auto_pad": f'"{auto_pad}"'}
    )
    x = array(draw, types[0], draw(st.integers(1, 2)), inputs, *spatial)
    w = array(draw, types[1], outputs, inputs // group, *kernel)
    text = ", ".join(f"{name}={value}" for name, value in attributes.items())
    return text, {"x": x, "w": w}


@pytest.mark.parametrize("x", BYTES)
@pytest.mark.parametrize("w", BYTES)
@laws
@given(data=st.data())
def test_conv_integer(x: str, w: str, data: st.DataObject) -> None:
    attributes, feeds = data.draw(convolution((x, w)))
    draw = data.draw
    zeros = {"a": array(draw, x), "b": array(draw, w)}
    count = data.draw(st.integers(0, 2))
    names = ["x", "w", "a", "b"][: 2 + count]
    ranks = ["", "", "", ""]
    ranks[0] = ranks[1] = f"[{', '.join('dcefg'[: feeds['x'].ndim])}]"
    signature = ", ".join(
        f"{t}{r} {n}" for t, r, n in zip((x, w, x, w), ("[]", "[]", "", ""), names, strict=False)
    )
    graph = f"({signature}) => (int32[] y) {{ y = ConvInteger<{attributes}>({', '.join(names)}) }}"
    given_ = {name: (feeds | zeros)[name] for name in names}
    assert side_by_side(graph).run(given_) == []


QLINEAR = (("uint8", "uint8"), ("uint8", "int8"), ("int8", "int8"))
"""Types of the operands; the result has that of the left one."""


@pytest.mark.parametrize(("x", "w"), QLINEAR)
@laws
@given(data=st.data())
def test_qlinear_conv(x: str, w: str, data: st.DataObject) -> None:
    attributes, feeds = data.draw(convolution((x, w)))
    draw, channels = data.draw, len(feeds["w"])
    scales = draw(st.sampled_from([(), (channels,)]))
    feeds |= {
        "xs": positive(draw),
        "xz": array(draw, x),
        "ws": positive(draw, *scales),
        "wz": np.broadcast_to(array(draw, w), scales).copy(),
        "ys": positive(draw),
        "yz": array(draw, x),
        "b": draw(hnp.arrays(np.int32, channels, elements=st.integers(-(10**6), 10**6))),
    }
    per = "[m]" if scales else ""
    graph = f"""({x}[] x, {w}[] w, float xs, {x} xz, float{per} ws, {w}{per} wz, float ys, {x} yz,
        int32[m] b) => ({x}[] y) {{
        y = QLinearConv<{attributes}>(x, xs, xz, w, ws, wz, ys, yz, b) }}"""
    assert side_by_side(graph).run(feeds) == []


@st.composite
def matrices(draw: st.DrawFn, types: tuple[str, str]) -> Feeds:
    batch, rows, inner, columns = draw(hnp.array_shapes(min_dims=4, max_dims=4, max_side=5))
    left = (batch, rows, inner) if draw(st.booleans()) else (rows, inner)
    right = (batch, inner, columns) if draw(st.booleans()) else (inner, columns)
    return {"x": array(draw, types[0], *left), "w": array(draw, types[1], *right)}


@pytest.mark.parametrize("x", BYTES)
@pytest.mark.parametrize("w", BYTES)
@laws
@given(data=st.data())
def test_mat_mul_integer(x: str, w: str, data: st.DataObject) -> None:
    feeds = data.draw(matrices((x, w)))
    draw = data.draw
    per_column = draw(st.booleans()) and feeds["w"].ndim == 2
    feeds |= {
        "a": array(draw, x),
        "b": array(draw, w, *(feeds["w"].shape[-1:] if per_column else ())),
    }
    columns = "[n]" if per_column else ""
    graph = f"""({x}[] x, {w}[] w, {x} a, {w}{columns} b) => (int32[] y, int32[] z)
        {{ y = MatMulInteger(x, w, a, b) z = MatMulInteger(x, w) }}"""
    assert side_by_side(graph).run(feeds) == []


@pytest.mark.parametrize(("x", "w"), QLINEAR)
@laws
@given(data=st.data())
def test_qlinear_mat_mul(x: str, w: str, data: st.DataObject) -> None:
    feeds = data.draw(matrices((x, w)))
    draw = data.draw
    feeds |= {name: positive(draw) for name in ("xs", "ws", "ys")}
    feeds |= {"xz": array(draw, x), "wz": array(draw, w), "yz": array(draw, x)}
    graph = f"""({x}[] x, {w}[] w, float xs, {x} xz, float ws, {w} wz, float ys, {x} yz)
        => ({x}[] y) {{ y = QLinearMatMul(x, xs, xz, w, ws, wz, ys, yz) }}"""
    assert side_by_side(graph).run(feeds) == []


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
@laws
@given(data=st.data())
def test_mat_mul_wraps(dtype: str, data: st.DataObject) -> None:
    feeds = data.draw(matrices((dtype, dtype)))
    graph = f"({dtype}[] x, {dtype}[] w) => ({dtype}[] y) {{ y = MatMul(x, w) }}"
    assert side_by_side(graph).run(feeds) == []


@pytest.mark.parametrize("dtype", BYTES)
@laws
@given(data=st.data())
def test_max_pool(dtype: str, data: st.DataObject) -> None:
    draw, rank = data.draw, data.draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    numbers = {
        "kernel_shape": kernel,
        "strides": [draw(st.integers(1, 3)) for _ in range(rank)],
        "pads": [draw(st.integers(0, k - 1)) for k in (*kernel, *kernel)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(rank)],
        "ceil_mode": draw(st.integers(0, 1)),
        "storage_order": draw(st.integers(0, int(rank == 2))),
    }
    x = array(draw, dtype, 2, 2, *(draw(st.integers(5, 7)) for _ in range(rank)))
    attributes = ", ".join(f"{name}={value}" for name, value in numbers.items())
    graph = f"""({dtype}[{", ".join("abcde"[: x.ndim])}] x) => ({dtype}[] y, {dtype}[] z, int64[] i)
        {{ y = MaxPool<{attributes}>(x) z, i = MaxPool<{attributes}>(x) }}"""
    assert side_by_side(graph).run({"x": x}) == []


GRIDS = ("int8", "uint8", "int16", "uint16")
REALS = st.floats(width=32, allow_subnormal=False)


@pytest.mark.parametrize("dtype", GRIDS)
@laws
@given(data=st.data())
def test_quantize_linear(dtype: str, data: st.DataObject) -> None:
    draw = data.draw
    x = draw(hnp.arrays(np.float32, (3, 4), elements=REALS | st.floats(-200, 200, width=32)))
    feeds = {
        "x": x,
        "s": positive(draw),
        "z": array(draw, dtype),
        "sc": positive(draw, 4),
        "zc": array(draw, dtype, 4),
        "sb": positive(draw, 3, 2),
        "zb": array(draw, dtype, 3, 2),
    }
    graph = f"""(float[3,4] x, float s, {dtype} z, float[4] sc, {dtype}[4] zc, float[3,2] sb,
        {dtype}[3,2] zb) => ({dtype}[] a, {dtype}[] b, {dtype}[] c, float[] d, float[] e, float[] f)
        {{
            a = QuantizeLinear(x, s, z) b = QuantizeLinear<axis=-1>(x, sc, zc)
            c = QuantizeLinear<axis=1, block_size=2>(x, sb, zb)
            d = DequantizeLinear(a, s, z) e = DequantizeLinear<axis=-1>(b, sc, zc)
            f = DequantizeLinear<axis=1, block_size=2>(c, sb, zb)
        }}"""
    assert side_by_side(graph).run(feeds) == []


@laws
@given(data=st.data())
def test_dequantize_int32(data: st.DataObject) -> None:
    feeds = {"x": array(data.draw, "int32", 5), "s": positive(data.draw)}
    graph = "(int32[n] x, float s) => (float[n] y) { y = DequantizeLinear(x, s) }"
    assert side_by_side(graph).run(feeds) == []


# tiny values would have a scale that float32 cannot hold
TAME = st.floats(-(2**20), 2**20, width=32).map(lambda value: value if abs(value) > 1e-9 else 0.0)


@laws
@given(x=hnp.arrays(np.float32, st.integers(1, 9), elements=TAME))
def test_dynamic_quantize_linear(x: npt.NDArray[np.float32]) -> None:
    graph = "(float[n] x) => (uint8[n] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }"
    assert side_by_side(graph).run({"x": x}) == []


def test_ties_go_to_the_even_neighbour() -> None:
    graph = """<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (int8[n] y) {
        s = Constant<value_float=2.0>() z = Constant<value=int8 {1}>()
        y = QuantizeLinear(x, s, z) }"""
    x = np.array([1, 3, 5, -1, -3, np.inf, -np.inf, np.nan], np.float32)
    found = Interpreter(onnx.parser.parse_model(graph)).run({"x": x})["y"]
    assert found.tolist() == [1, 3, 3, 1, -1, 127, -128, -128]


def test_a_sum_that_leaves_int32_is_refused() -> None:
    graph = """<ir_version: 10, opset_import: ["" : 21]> g (uint8[m,k] x, uint8[k,n] w)
        => (int32[m,n] y) { [big] y = MatMulInteger(x, w) }"""
    interpreter = Interpreter(onnx.parser.parse_model(graph))
    fits = (2**31 - 1) // 255**2
    x, w = np.full((1, fits), 255, np.uint8), np.full((fits, 1), 255, np.uint8)
    assert interpreter.run({"x": x, "w": w})["y"] == fits * 255**2
    x, w = np.full((1, fits + 1), 255, np.uint8), np.full((fits + 1, 1), 255, np.uint8)
    with pytest.raises(IntqError, match=r"node 'big' \(MatMulInteger\) .* leaves int32"):
        interpreter.run({"x": x, "w": w})


def test_a_long_depthwise_sum_is_wide() -> None:
    graph = """<ir_version: 10, opset_import: ["" : 21]> g (uint8[1,1,n] x, uint8[1,1,n] w)
        => (int32[1,1,1] y) { [long] y = ConvInteger(x, w) }"""
    interpreter = Interpreter(onnx.parser.parse_model(graph))
    full = np.full((1, 1, 40000), 255, np.uint8)
    with pytest.raises(IntqError, match=r"node 'long' \(ConvInteger\) .* 2601000000 .* int32"):
        interpreter.run({"x": full, "w": full})


def test_a_kernel_longer_than_its_input_is_refused() -> None:
    graph = """<ir_version: 10, opset_import: ["" : 21]> g (uint8[1,1,n] x, uint8[1,1,3] w)
        => (int32[] y) { y = ConvInteger<dilations=[2]>(x, w) }"""
    interpreter = Interpreter(onnx.parser.parse_model(graph))
    x, w = np.zeros((1, 1, 4), np.uint8), np.zeros((1, 1, 3), np.uint8)
    with pytest.raises(IntqError, match="a kernel of extent 5 over 4 elements"):
        interpreter.run({"x": x, "w": w})


def test_float_matrices_are_refused() -> None:
    graph = """<ir_version: 10, opset_import: ["" : 21]> g (float[2,2] x) => (float[2,2] y)
        { y = MatMul(x, x) }"""
    interpreter = Interpreter(onnx.parser.parse_model(graph))
    with pytest.raises(IntqError, match="float32 matrices; expected integers"):
        interpreter.run({"x": np.zeros((2, 2), np.float32)})
