"""The three graphs on onnxruntime against the network in PyTorch."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from onnx_intq import graph
from onnx_intq.models.rnnt import Rnnt, RnntConfig
from onnx_intq.models.rnnt_graphs import OPERATORS, graphs
from onnx_intq.models.rnnt_joint import ACTIVATIONS
from onnx_intq.runtime import Session

CONFIGS = (
    RnntConfig(labels=tuple("abc"), features=4, factor=3, width=6, predictor=5, joint=4),
    RnntConfig(
        labels=("a",),
        features=2,
        factor=1,
        width=3,
        layers=1,
        predictor=2,
        predictor_layers=2,
        joint=3,
        activation="relu",
        dropout=0.5,
    ),
    RnntConfig(labels=("a",), features=2, factor=4, width=3, layers=3, activation="sigmoid"),
)


def sessions(network: Rnnt, opset: int = 17) -> dict[str, Session]:
    made = graphs(network, opset).items()
    return {name: Session(graph.model_from_graph(part), threads=1) for name, part in made}


def zeros(layers: int, batch: int, width: int) -> dict[str, np.ndarray]:
    return {name: np.zeros((layers, batch, width), np.float32) for name in ("h", "c")}


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("config", CONFIGS)
def test_graphs_compute_what_the_network_computes(config: RnntConfig, opset: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Rnnt(config).eval()
        signal = torch.randn(2, config.features, 11)
    labels = torch.tensor([[0, 0, 0], [0, 0, 0]])
    parts = sessions(network, opset)
    start = zeros(config.layers, 2, config.width)
    encoded = parts["encoder"].run({"audio_signal": signal.numpy(), **start})
    states = zeros(config.predictor_layers, 2, config.predictor)
    predicted = []
    for label in [np.full((2, 1), len(config.labels)), *np.split(labels.numpy(), 3, axis=1)]:
        found = parts["predictor"].run({"label": label, **states})
        predicted.append(found["predicted"])
        states = {name: found[f"{name}_out"] for name in ("h", "c")}
    feeds = {"encoded": encoded["encoded"], "predicted": np.concatenate(predicted, 1)}
    (logits,) = parts["joint"].run(feeds).values()
    with torch.no_grad():
        expected = network(signal, labels)
        ended = torch.stack(network.encoder(signal)[1])
    assert logits.shape == expected.shape
    # Sums of at most 100 products, through four layers.
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-5)
    after = np.stack([encoded["h_out"], encoded["c_out"]])
    np.testing.assert_allclose(after, ended.numpy(), rtol=0, atol=1e-5)


def test_graphs_are_of_standard_operators_without_shape_arithmetic(tmp_path: Path) -> None:
    made = graphs(Rnnt(CONFIGS[0]))
    found = {name: {node.op for node in part.nodes} for name, part in made.items()}
    moves = {"Transpose", "Squeeze"}
    assert found["encoder"] == {"Conv", "LSTM", "Split", "Concat"} | moves
    assert found["predictor"] == {"Gather", "LSTM"} | moves
    assert found["joint"] == {"MatMul", "Add", "Unsqueeze", "Tanh"}
    for name, part in made.items():
        graph.save(part, tmp_path / f"{name}.onnx")
        onnx.checker.check_model(str(tmp_path / f"{name}.onnx"), full_check=True)
        names = [node.name for node in part.nodes]
        assert len(set(names)) == len(names)


def test_outputs_come_in_order_and_say_their_shapes() -> None:
    parts = sessions(Rnnt(CONFIGS[0]))
    shapes = {
        name: {spec.name: spec.shape for spec in (*part.inputs, *part.outputs)}
        for name, part in parts.items()
    }
    assert shapes == {
        "encoder": {
            "audio_signal": ("batch", 4, "time"),
            "h": (2, "batch", 6),
            "c": (2, "batch", 6),
            "encoded": ("batch", "frames", 6),
            "h_out": (2, "batch", 6),
            "c_out": (2, "batch", 6),
        },
        "predictor": {
            "label": ("batch", 1),
            "h": (1, "batch", 5),
            "c": (1, "batch", 5),
            "predicted": ("batch", 1, 5),
            "h_out": (1, "batch", 5),
            "c_out": (1, "batch", 5),
        },
        "joint": {
            "encoded": ("batch", "T", 6),
            "predicted": ("batch", "U", 5),
            "logits": ("batch", "T", "U", 4),
        },
    }


def test_every_activation_has_an_operator() -> None:
    assert OPERATORS.keys() == ACTIVATIONS.keys()
