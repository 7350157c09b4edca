"""What rounding a tensor costs is estimated as if it were tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.graph import Names, graph_from_model, model_from_graph
from onnx_intq.grid import Grid, affine, symmetric
from onnx_intq.pairs import append_pair, let_read
from onnx_intq.quantize import prepared
from onnx_intq.runtime import Session
from onnx_intq.sensitivity import ByRow, OnGrid, batch_axes, measured, noise_to_signal
from onnx_intq.transform import IntqError

BYTE = Grid(8, signed=False)
NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, t, 16] x) => (float[n, t, 8] y) {
        a = MatMul(x, v)
        b = Relu(a)
        c = MatMul(b, w)
        s = Softmax(a)
        m = MatMul(s, w)
        d = Add(c, m)
        y = LogSoftmax(d)
    }"""


@pytest.fixture(scope="module")
def network() -> gs.Graph:
    random = np.random.default_rng(0)
    proto = onnx.parser.parse_model(NETWORK)
    for name, shape in (("v", (16, 16)), ("w", (16, 8))):
        values = random.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return graph_from_model(proto)


def feeds(batches: int = 4) -> list[dict[str, npt.NDArray[Any]]]:
    random = np.random.default_rng(1)
    return [{"x": random.standard_normal((2, 50, 16)).astype(np.float32)} for _ in range(batches)]


def tried(graph: gs.Graph, tensor: str, limits: tuple[float, float], result: str) -> float:
    """Noise to signal of `result` where `tensor` is really rounded."""
    copy = graph.copy()
    for model in (graph, copy):
        model.outputs = [model.tensors()[result].to_variable(np.float32, None)]
    found = copy.tensors()[tensor]
    readers, names = list(found.outputs), Names(copy)
    scale, zero_point = affine(*limits, BYTE)
    pair = append_pair(copy, found, scale, zero_point, BYTE.dtype, names)
    let_read(readers, found, pair[1].outputs[0])
    signal = noise = 0.0
    for feed in feeds():
        exact = Session(model_from_graph(graph)).run(feed)[result]
        noise += float(np.square(Session(model_from_graph(copy)).run(feed)[result] - exact).sum())
        signal += float(np.square(exact).sum())
    return noise / signal


@pytest.mark.parametrize("tensor", ["x", "b", "s"])
@pytest.mark.parametrize("reach", [0.5, 1.0, 4.0])
def test_estimates_are_what_trying_shows(network: gs.Graph, tensor: str, reach: float) -> None:
    limits = (-4.0 * reach, 4.0 * reach)
    found = noise_to_signal(network, feeds(), {tensor: [OnGrid(limits, BYTE)]}, samples=8)
    shown = tried(network.copy(), tensor, limits, "d")
    assert abs(10 * np.log10(found[tensor][0] / shown)) < 4  # 16 directions: +-1.5 dB


def test_results_are_measured_before_they_are_normalised(network: gs.Graph) -> None:
    assert measured(network) == ["d"]
    plain = network.copy()
    plain.outputs = [plain.tensors()["c"]]
    assert measured(plain) == ["c"]


def test_what_the_result_does_not_depend_on_costs_nothing(network: gs.Graph) -> None:
    copy = network.copy()
    copy.outputs = [copy.tensors()["c"].to_variable(np.float32, ("n", "t", 8))]
    found = noise_to_signal(
        copy, feeds(), {"s": [OnGrid((0, 1), BYTE)], "b": [OnGrid((0, 9), BYTE)]}
    )
    assert found["s"] == [0]
    assert found["b"] > 0


def test_more_samples_than_there_are_change_nothing(network: gs.Graph) -> None:
    choices = {"b": [OnGrid((0, 9), BYTE), OnGrid((0, 2), BYTE)]}
    few, many = (noise_to_signal(network, feeds(), choices, samples=n)["b"] for n in (8, 80))
    assert few.tolist() == many.tolist()
    assert few[0] < few[1]


def test_without_data_there_is_nothing_to_measure(network: gs.Graph) -> None:
    with pytest.raises(IntqError, match="the data holds no batch"):
        noise_to_signal(network, [], {"b": [OnGrid((0, 9), BYTE)]})


@given(st.floats(0.1, 100), st.floats(0.1, 100), st.booleans())
def test_rounding_is_that_of_the_grid(low: float, high: float, signed: bool) -> None:
    grid = Grid(8, signed=signed)
    x = torch.linspace(-2 * low, 2 * high, 101)
    rounded = OnGrid((-low, high), grid)(x)
    scale, zero_point = symmetric(-low, high, grid) if signed else affine(-low, high, grid)
    integers = np.rint(x.numpy() / scale) + int(zero_point)
    wanted = (np.clip(integers, grid.low, grid.high) - int(zero_point)) * scale
    np.testing.assert_allclose(rounded.numpy(), wanted, atol=float(scale) * 1e-3)


@given(st.integers(0, 2**16), st.floats(0.1, 20))
def test_probabilities_by_row_keep_their_sum(seed: int, spread: float) -> None:
    x = torch.softmax(torch.from_numpy(np.random.default_rng(seed).normal(0, spread, (3, 40))), -1)
    rounded = ByRow()(x)
    np.testing.assert_allclose(rounded.sum(-1), 1, rtol=1e-6)
    largest = x.amax(-1, keepdim=True)
    assert ((rounded - x).abs() <= largest * (0.5 / 255) * 45).all()  # 40 roundings in the sum


@pytest.mark.slow
def test_quartznet_is_nowhere_as_sensitive_as_a_transformer(assets: Path, tmp_path: Path) -> None:
    from onnx_intq.models.export import export_named

    path = tmp_path / "digits.onnx"
    export_named("digits", path)
    graph = prepared(path)
    random = np.random.default_rng(0)
    (spec,) = graph.inputs
    batch = {spec.name: random.standard_normal((2, spec.shape[1], 200)).astype(np.float32)}
    names = [t.name for n in graph.nodes if n.op == "Relu" for t in n.outputs]
    found = noise_to_signal(graph, [batch], {n: [OnGrid((0, 8), BYTE)] for n in names})
    assert all(0 < noise[0] < 1e-2 for noise in found.values())


STATES = """<ir_version: 8, opset_import: ["" : 17]>
    g (int64[n, 1] label, float[2, n, 4] h) => (float[n, 1, 4] y, float[2, n, 4] h_out) {
        e = Gather(table, label)
        sums = ReduceSum<keepdims = 0>(h, zero)
        a, b = Split<axis = 0>(h, halves)
        h_out = Concat<axis = 0>(b, a)
        s = Unsqueeze(sums, one)
        y = Add(e, s)
    }"""


def test_states_of_layers_are_cut_along_their_batch() -> None:
    proto = onnx.parser.parse_model(STATES)
    table = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    known = {"table": table, "zero": np.array([0]), "one": np.array([1]), "halves": np.ones(2, int)}
    for name, values in known.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    graph = graph_from_model(proto)
    assert batch_axes(graph) == {"label": 0, "h": 1}
    feed = {"label": np.array([[1], [2], [3]]), "h": np.ones((2, 3, 4), np.float32)}
    choices = {"h": [OnGrid((-0.5, 0.5), BYTE)]}
    found = noise_to_signal(graph, [feed], choices, samples=3)
    assert found["h"] > 0
    made_of_integers = noise_to_signal(graph, [feed], {"e": [OnGrid((-2, 2), BYTE)]}, samples=3)
    assert made_of_integers["e"] == [0]
