"""Constants cut into bit planes: every runtime decodes them to the same bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.interpreter import Interpreter
from onnx_intq.packing import (
    PLANES,
    Packer,
    bit_planes,
    decoded,
    distinct,
    index_bits,
    packed_bytes,
    packed_bytes_of,
    required_opset,
    unpack,
)
from onnx_intq.runtime import Session, optimized_ops

BYTES = [np.int8, np.uint8]


def few(seed: int, bits: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of up to 2^bits distinct values."""
    random = np.random.default_rng(seed)
    levels = random.choice(256, 1 << bits, replace=False).astype(np.uint8).view(dtype)
    chosen: npt.NDArray[Any] = random.choice(levels, shape)
    return chosen


def packed(values: npt.NDArray[Any], opset: int = 21) -> gs.Graph:
    """x + values, with the values packed."""
    shape = list(values.shape)
    x, y = (gs.Variable(name, np.int32, shape) for name in "xy")
    wide = gs.Variable("wide", np.int32)
    graph = gs.Graph(inputs=[x], outputs=[y], opset=opset, ir_version=10)
    packer = Packer(graph)
    w = packer.decoded(values, "w")
    graph.nodes.append(gs.Node("Cast", "widen", {"to": 6}, [w], [wide]))
    graph.nodes.append(gs.Node("Add", "add", {}, [x, wide], [y]))
    packer.finish()
    return graph_from_model(model_from_graph(graph))


@given(
    st.integers(0, 99),
    st.integers(1, 7),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from(BYTES),
    st.sampled_from([21, 25]),
)
def test_every_runtime_decodes_what_was_packed(
    seed: int, bits: int, shape: list[int], dtype: npt.DTypeLike, opset: int
) -> None:
    values = few(seed, bits, tuple(shape), dtype)
    graph = packed(values, opset)
    feeds = {"x": np.zeros(shape, np.int32)}
    model = model_from_graph(graph)
    wanted = values.astype(np.int32)
    for optimize in (True, False):
        found = Session(model, threads=1, optimize=optimize).run(feeds)["y"]
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(Interpreter(graph).run(feeds)["y"], wanted)
    (each,) = decoded(graph)
    assert each.bits == index_bits(values)
    assert unpack(graph) == 1
    assert [node.op for node in graph.nodes] == ["Cast", "Add"]
    w = graph.tensors()["w"]
    assert w.values.dtype == values.dtype
    np.testing.assert_array_equal(w.values, values)
    assert unpack(graph) == 0


@pytest.mark.parametrize("bits", range(1, 8))
def test_onnxruntime_decodes_once_when_it_loads(bits: int) -> None:
    assert set(optimized_ops(model_from_graph(packed(few(0, bits, (63, 65), np.int8))))) <= {"Add"}


@given(st.integers(0, 99), st.integers(1, 7), st.integers(1, 40))
def test_planes_hold_the_bits_of_the_index(seed: int, bits: int, size: int) -> None:
    indices = np.random.default_rng(seed).integers(0, 1 << bits, size)
    planes, shift = bit_planes(indices, bits), 0
    total = np.zeros(size, np.int64)
    for plane, width in zip(planes, PLANES[bits], strict=True):
        assert plane.max() < 1 << width
        total += plane.astype(np.int64) << shift
        shift += width
    assert shift == bits
    np.testing.assert_array_equal(total, indices)


@given(st.integers(0, 99), st.sampled_from([1, 2, 4]), st.integers(1, 40))
def test_bytes_hold_low_bits_first(seed: int, width: int, size: int) -> None:
    plane = np.random.default_rng(seed).integers(0, 1 << width, size).astype(np.uint8)
    found = packed_bytes_of(plane, width)
    assert found.shape == (math.ceil(size * width / 8), 1)
    back = (found >> np.arange(0, 8, width, dtype=np.uint8)) & ((1 << width) - 1)
    np.testing.assert_array_equal(back.ravel()[:size], plane)
    assert not back.ravel()[size:].any()


@given(st.integers(0, 99), st.sampled_from(BYTES), st.booleans())
def test_distinct_values_ascend(seed: int, dtype: npt.DTypeLike, transposed: bool) -> None:
    values = few(seed, 5, (7, 9), dtype)
    found = distinct(values.T if transposed else values)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, np.unique(values))


def test_bits_and_sizes() -> None:
    assert [index_bits(np.arange(n, dtype=np.int8)) for n in (1, 2, 3, 32, 33, 128)] == [
        1, 1, 2, 5, 6, 7,
    ]  # fmt: skip
    assert index_bits(np.arange(-128, 127, dtype=np.int8)) == 8
    assert [required_opset(bits) for bits in (1, 3, 4, 7)] == [18, 18, 21, 21]
    large = np.zeros((512, 512), np.int8)
    large[0, :32] = np.arange(32)
    assert 512 * 512 * 5 // 8 < packed_bytes(large) < 512 * 512 * 5 // 8 + 1000
    many = np.arange(256).astype(np.uint8)
    assert packed_bytes(many) >= many.nbytes


def test_equal_tables_are_stored_once() -> None:
    graph = gs.Graph(opset=21, ir_version=10)
    packer = Packer(graph)
    values = few(0, 5, (16, 16), np.int8)
    made = [packer.decoded(each, name) for name, each in (("a", values), ("b", values[::-1]))]
    packer.finish()
    tables = {id(node.inputs[0]) for node in graph.nodes if node.op == "Gather"}
    assert len(tables) == 1
    assert [t.name for t in made] == ["a", "b"]


TABLES = """<ir_version: 10, opset_import: ["" : 21]>
    g (uint8[3] x, int64[3] i) => (int8[3] y, int32[3] p)
    <int8[4] t = {1, 2, 3, 4}, uint8[3] k = {0, 1, 2}, int64[4] wide = {1, 2, 3, 4},
     uint8[1] s = {1}> {
        shifted = BitShift<direction = "RIGHT">(k, s)
        c = Cast<to = 6>(shifted)
        p = Cast<to = 6>(shifted)
        fixed = Gather(t, c)
        ci = Cast<to = 6>(x)
        moving = Gather(t, ci)
        direct = Gather(t, i)
        far = Gather(wide, c)
        near = Cast<to = 3>(far)
        a = Add(fixed, moving)
        b = Add(a, direct)
        y = Add(b, near)
    }"""


def test_other_tables_are_left_alone_and_shared_nodes_stay() -> None:
    import onnx

    graph = graph_from_model(onnx.parser.parse_model(TABLES))
    feeds = {"x": np.array([0, 1, 2], np.uint8), "i": np.array([3, 3, 3])}
    before = Session(model_from_graph(graph), threads=1).run(feeds)
    assert [each.node.outputs[0].name for each in decoded(graph)] == ["fixed"]
    assert unpack(graph) == 1
    after = Session(model_from_graph(graph), threads=1).run(feeds)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert "p" in graph.tensors()
    assert graph.tensors()["fixed"].values.tolist() == [1, 1, 2]
