"""`products.py`: weights and biases as integers, and the requantisation of their sums."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnx_intq.graph import graph_from_model
from onnx_intq.grid import Grid
from onnx_intq.lowering import CannotLowerError, Operand, Site
from onnx_intq.products import Weight, bias, step, unsigned, weight
from onnx_intq.transform import IntqError

law = settings(max_examples=60, deadline=None)


def dequantized(stored: Any, scales: Any, zeros: Any = None, **attrs: Any) -> gs.Tensor:
    """A constant behind DequantizeLinear."""
    inputs = [gs.Constant("w", stored), gs.Constant("s", np.asarray(scales, np.float32))]
    inputs += [] if zeros is None else [gs.Constant("z", np.asarray(zeros, stored.dtype))]
    result = gs.Variable("dequantized", np.float32)
    gs.Node("DequantizeLinear", "dq", attrs, inputs, [result])
    return result


def stored(shape: tuple[int, ...], dtype: str = "int8") -> Any:
    info = np.iinfo(dtype)
    return np.random.default_rng(0).integers(info.min, info.max + 1, shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32"])
@pytest.mark.parametrize("axis", [0, 1, -1, -2])
@pytest.mark.parametrize("pointed", [False, True])
def test_a_weight_is_its_integers_and_its_scales(dtype: str, axis: int, pointed: bool) -> None:
    w = stored((3, 4), dtype)
    size = w.shape[axis]
    scales, zeros = np.linspace(0.1, 0.2, size), np.arange(size) if pointed else None
    found = weight(dequantized(w, scales, zeros, axis=axis))
    assert found.centred.dtype == np.int64
    assert (found.axis, found.scales.shape) == (axis % 2, (size,))
    points = 0 if zeros is None else zeros.reshape((-1, 1) if axis % 2 == 0 else (-1,))
    np.testing.assert_array_equal(found.centred, w.astype(np.int64) - points)
    np.testing.assert_array_equal(found.scales, scales.astype(np.float32))


@pytest.mark.parametrize("scale", [0.5, [0.5]])
@pytest.mark.parametrize("zero", [None, 3, [3]])
def test_one_scale_is_a_scalar(scale: Any, zero: Any) -> None:
    w = stored((3, 4))
    found = weight(dequantized(w, scale, zero))
    assert (found.axis, found.scales.shape, float(found.scales)) == (0, (), 0.5)
    np.testing.assert_array_equal(found.centred, w.astype(np.int64) - (0 if zero is None else 3))


def test_other_weights_are_refused() -> None:
    message = "its weight '{}' is no constant with scales per channel"
    computed = gs.Variable("x", np.float32)
    with pytest.raises(CannotLowerError, match=message.format("x")):
        weight(computed)
    with pytest.raises(CannotLowerError, match=message.format("f")):
        weight(gs.Constant("f", np.ones(3, np.float32)))
    blocks = dequantized(stored((4, 2)), np.ones((2, 2)), axis=0, block_size=2)
    with pytest.raises(CannotLowerError, match=message.format("dequantized")):
        weight(blocks)
    at_run_time = dequantized(stored((4, 2)), 1.0)
    at_run_time.inputs[0].inputs[0] = computed
    with pytest.raises(CannotLowerError, match=message.format("dequantized")):
        weight(at_run_time)
    scale_at_run_time = dequantized(stored((4, 2)), 1.0)
    scale_at_run_time.inputs[0].inputs[1] = computed
    with pytest.raises(CannotLowerError, match=message.format("dequantized")):
        weight(scale_at_run_time)


@law
@given(st.integers(-400, 400), st.integers(0, 300))
def test_weights_become_uint8_where_they_span_8_bits(low: int, span: int) -> None:
    centred = np.array([low, low + span], np.int64)
    covered = max(low + span, 0) - min(low, 0)
    if covered > 255:
        with pytest.raises(CannotLowerError, match=rf"span {low}\.\.{low + span}, over 8 bits"):
            unsigned(centred)
        return
    found, zero_point = unsigned(centred)
    assert found.dtype == np.uint8
    assert 0 <= zero_point <= 255
    np.testing.assert_array_equal(found.astype(np.int64) - zero_point, centred)
    if low >= -128 and low + span <= 127:
        assert zero_point == 128


def operand(grid: Grid, zero_point: int, scale: float = 0.02) -> Operand:
    tensor = gs.Variable("x", grid.dtype)
    return Operand(tensor=tensor, scale=scale, zero_point=zero_point, grid=grid)


def site(result: Operand, node: gs.Node | None = None) -> Site:
    return Site(
        node=node or gs.Node("Conv", "conv"),
        bias=None,
        chain=(),
        result=result,
        first=result.grid.low + 1,
        last=result.grid.high - 2,
    )


TAPS = arrays(np.int64, (3, 4), elements=st.integers(-255, 255))


@law
@given(TAPS, st.booleans(), st.integers(0, 255), st.sampled_from([8, 16]))
def test_a_requantisation_knows_all_sums_there_can_be(
    rows: Any, signed: bool, zero_point: int, bits: int
) -> None:
    x = operand(Grid(8, signed=signed), zero_point - 128 * signed)
    y = operand(Grid(bits, signed=False), 5, 0.3)
    w = Weight(centred=rows, scales=np.array([0.1, 0.2, 1e-9]), axis=0)
    found = step(site(y), x, w, rows, None, alpha=2.0)
    ends = x.grid.low - x.zero_point, x.grid.high - x.zero_point
    sums = np.array([[*map(int, rows @ np.array(x))] for x in product(ends, repeat=4)])
    np.testing.assert_array_equal(found.low, sums.min(axis=0))
    np.testing.assert_array_equal(found.high, sums.max(axis=0))
    # Padding adds nothing, so a sum of fewer taps lies between as well.
    assert (found.low <= 0).all()
    assert (found.high >= 0).all()
    assert (found.zero_point, found.first, found.last) == (5, 1, y.grid.high - 2)
    assert not found.bias.any()
    real = found.multiplier.b / 2.0**found.multiplier.c
    wanted = 0.02 * w.scales * 2.0 / 0.3
    assert (np.abs(real - wanted) <= np.maximum(wanted * 2.0**-30, 2.0 ** (bits - 62))).all()
    assert (found.multiplier.c <= 62 - bits).all()


def test_one_scale_serves_all_rows_and_biases_are_rounded_in_float32() -> None:
    x, y = operand(Grid(8, signed=True), 0), operand(Grid(8, signed=True), 0, 0.3)
    w = Weight(centred=np.ones((5, 2), np.int64), scales=np.asarray(0.1), axis=0)
    values = np.array([-1, -0.001, 0, 0.003, 1], np.float32)
    found = step(site(y), x, w, w.centred, values)
    assert found.multiplier.b.shape == found.bias.shape == found.low.shape == (5,)
    units = np.float32(0.02) * np.float32(0.1)
    np.testing.assert_array_equal(found.bias, np.rint(values / units))
    one = step(site(y), x, w, w.centred, np.array(0.5, np.float32))
    assert (one.bias == np.rint(np.float32(0.5) / units)).all()


def test_biases_and_scales_out_of_reach_are_refused() -> None:
    x, y = operand(Grid(8, signed=True), 0), operand(Grid(8, signed=True), 0, 0.3)
    w = Weight(centred=np.ones((1, 2), np.int64), scales=np.asarray(0.1), axis=0)
    with pytest.raises(CannotLowerError, match="its bias exceeds 32 bits in steps of input scale"):
        step(site(y), x, w, w.centred, np.array([1e8], np.float32))
    far = Weight(centred=w.centred, scales=np.asarray(1e15), axis=0)
    with pytest.raises(IntqError, match="a requantisation by"):
        step(site(y), x, far, w.centred, None)


def test_a_bias_is_constant_or_absent() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[1, 2, 3] x, float[2] f)
        => (float[1, 2, 3] y, float[1, 2, 3] z, float[1, 2, 3] u, float[1, 2, 3] v)
        <float[2, 2, 1] w = {1, 2, 3, 4}, float[2] k = {5, 6}, int32[2] n = {5, 6}, float s = {2}> {
            d = DequantizeLinear(n, s) y = Conv(x, w, k) z = Conv(x, w) u = Conv(x, w, d)
            v = Conv(x, w, f)
        }"""
    )
    graph = graph_from_model(proto)
    result = operand(Grid(8, signed=True), 0)
    y, z, u, v = (site(result, n) for n in graph.nodes if n.op == "Conv")
    np.testing.assert_array_equal(bias(y), [5, 6])
    assert bias(z) is None
    np.testing.assert_array_equal(bias(u), [10, 12])
    with pytest.raises(CannotLowerError, match="its bias is computed at run time"):
        bias(v)


def test_an_input_of_16_bits_has_room_for_larger_biases() -> None:
    """Its steps are smaller, and its accumulators have 64 bits."""
    y = operand(Grid(8, signed=True), 0, 0.3)
    x = replace(operand(Grid(16, signed=True), 5), scale=0.02 / 256)
    w = Weight(centred=np.array([[-3, 4]]), scales=np.asarray(0.1), axis=0)
    found = step(site(y), x, w, w.centred, np.array([1e6], np.float32))
    assert found.bias[0] == np.float32(1e6) / (np.float32(0.02 / 256) * np.float32(0.1)) > 1 << 31
    assert (found.low.tolist(), found.high.tolist()) == (
        [-3 * (32767 - 5) + 4 * (-32768 - 5)],
        [-3 * (-32768 - 5) + 4 * (32767 - 5)],
    )
    with pytest.raises(CannotLowerError, match="its bias exceeds 40 bits in steps of input scale"):
        step(site(y), x, w, w.centred, np.array([1e7], np.float32))
