"""Graphs that run with other weights."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from onnx_intq.graph import graph_from_model
from onnx_intq.quantize import prepared
from onnx_intq.training_network import TrainedNetwork, bias_names, weight_places

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[batch, 4] x) => (float[batch, 4] y) {
        a = MatMul(x, w)
        b = Add(a, bias)
        p = Add(b, table)
        n = LayerNormalization(p, gain, offset)
        s = Add(n, one)
        d = Add(s, x)
        y = Gemm(d, w, other)
    }"""
CONSTANTS = {
    "w": np.eye(4),
    "bias": np.ones(4),
    "table": np.ones((3, 4)),
    "gain": np.ones(4),
    "offset": np.zeros((1, 4)),
    "one": np.ones(1),
    "other": np.zeros(4),
}


def test_biases_are_what_is_added_along_an_axis() -> None:
    model = onnx.parser.parse_model(TEXT)
    for name, values in CONSTANTS.items():
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    graph = graph_from_model(model)
    assert bias_names(graph) == ["bias", "gain", "offset", "other"]
    (place,) = weight_places({"model": graph})
    assert place.key == "model/w"
    assert len(place.site.nodes) == 2


def test_values_take_the_place_of_weights(tiny: Path) -> None:
    network = TrainedNetwork({"a": prepared(tiny), "b": prepared(tiny)}, {}, "cpu")
    assert [key.partition("/")[0] for key in network.weights] == ["a", "a", "b", "b"]
    assert sum(key.startswith("a/") for key in network.biases) == 2
    feed = {"audio_signal": torch.ones(2, 4, 9)}
    (own,) = network.run("a", feed, {}).values()
    key = next(iter(network.weights))
    weight = torch.zeros(network.weights[key].site.constant.values.shape, requires_grad=True)
    (changed,) = network.run("a", feed, {key: weight}).values()
    assert not torch.equal(own, changed)
    assert not own.requires_grad
    changed[..., 0].sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    (other,) = network.run("b", feed, {key: weight}).values()
    assert torch.equal(other, own)


def test_the_graphs_are_not_changed(tiny: Path) -> None:
    graph = prepared(tiny)
    before = {n: t.values.copy() for n, t in graph.tensors().items() if hasattr(t, "values")}
    network = TrainedNetwork({"model": graph}, {}, "cpu")
    for bias in network.biases.values():
        bias.add_(1)
    after = graph.tensors()
    assert all(np.array_equal(after[name].values, v) for name, v in before.items())


@pytest.mark.parametrize("tap", [True, False])
def test_taps_are_returned_too(tiny: Path, tap: bool) -> None:
    graph = prepared(tiny)
    taps = {"model": [graph.nodes[0].outputs[0].name]} if tap else {}
    found = TrainedNetwork({"model": graph}, taps, "cpu").run(
        "model", {"audio_signal": torch.ones(1, 4, 5)}, {}
    )
    assert len(found) == 1 + tap
