"""What the first BatchNorm says of the input: means exactly, deviations in proportion."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, load
from onnx_intq.input_statistics import STRETCH, Statistics, input_statistics, stretched
from onnx_intq.latent import correlated
from onnx_intq.synthesize import Recipe, synthesize

CORRELATION = 0.9


def first_layer(
    mean: np.ndarray, deviation: np.ndarray, *, channels: int = 48, taps: int = 5, seed: int = 0
) -> gs.Graph:
    """Conv and the BatchNormalization that has seen uncorrelated features of these statistics."""
    random = np.random.default_rng(seed)
    w = random.standard_normal((channels, len(mean), taps))
    bias = random.standard_normal(channels)
    alike = CORRELATION ** np.abs(np.subtract.outer(np.arange(taps), np.arange(taps)))
    shares = np.einsum("ock,kl,ocl->oc", w, alike, w)
    weights = {
        "w": w,
        "b": bias,
        "gamma": np.ones(channels),
        "beta": np.zeros(channels),
        "mean": w.sum(2) @ mean + bias,
        "variance": shares @ np.square(deviation),
    }
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        m (float[batch, {len(mean)}, time] x) => (float[batch, {channels}, t] y) {{
            c = Conv(x, w, b)
            y = BatchNormalization(c, gamma, beta, mean, variance)
        }}""")
    for name, values in weights.items():
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(values.astype(np.float32), name)
        )
    return graph_from_model(model)


@given(
    mean=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_means_are_found(mean: list[float], seed: int) -> None:
    graph = first_layer(np.array(mean), np.ones(len(mean)), seed=seed)
    found = input_statistics(graph, "x", CORRELATION)
    assert found is not None
    # Float32 keeps 2^-24 of the largest mean, and the equations are well conditioned.
    np.testing.assert_allclose(found.mean, mean, rtol=0, atol=1e-3)


@given(seed=st.integers(0, 99))
def test_deviations_are_found(seed: int) -> None:
    deviation = np.array([200.0, 50, 20, 10])
    found = input_statistics(first_layer(np.zeros(4), deviation, seed=seed), "x", CORRELATION)
    assert found is not None
    np.testing.assert_allclose(found.deviation[:2], deviation[:2], rtol=0.3)
    assert found.deviation[0] > 2 * found.deviation[1] > 2 * found.deviation[3]


def test_nothing_is_known_of_other_graphs() -> None:
    graph = first_layer(np.zeros(4), np.ones(4))
    assert input_statistics(graph, "y", CORRELATION) is None
    assert input_statistics(first_layer(np.zeros(4), np.ones(4), channels=3), "x", 0.9) is None
    graph.nodes[0].op = "ConvTranspose"
    assert input_statistics(graph, "x", CORRELATION) is None
    graph.nodes[0].op, graph.nodes[1].op = "Conv", "InstanceNormalization"
    assert input_statistics(graph, "x", CORRELATION) is None
    graph.nodes[1].op, graph.nodes[0].attrs["group"] = "BatchNormalization", 4
    assert input_statistics(graph, "x", CORRELATION) is None


def test_start_has_the_statistics() -> None:
    statistics = Statistics(mean=np.array([-300.0, 5]), deviation=np.array([100.0, 2]))
    latent = correlated((64, 2, 400), CORRELATION, torch.Generator().manual_seed(0))
    values = statistics.start(latent).value().numpy()
    np.testing.assert_allclose(values.mean(axis=(0, 2)), [-300, 5], atol=10)
    np.testing.assert_allclose(values.std(axis=(0, 2)), [100, 2], rtol=0.05)


def test_stretching_keeps_means() -> None:
    values = np.random.default_rng(0).normal(7, 3, (4, 2, 50)).astype(np.float32)
    found = stretched(values)
    np.testing.assert_allclose(found.mean(axis=(0, 2)), values.mean(axis=(0, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.std(axis=(0, 2)), STRETCH * values.std(axis=(0, 2)), rtol=1e-5)


def test_made_data_has_the_scale_of_the_features() -> None:
    mean, deviation = np.array([-300.0, 40, 0, 0]), np.array([200.0, 50, 5, 1])
    recipe = Recipe(batches=1, batch_size=4, frames=100, steps=2)
    (result,) = synthesize(first_layer(mean, deviation), recipe)
    x = result.batch["x"]
    np.testing.assert_allclose(x[:, 0].mean(), -300, atol=100)
    assert 1 < x[:, 0].std() / 200 < 2.2
    assert x[:, 3].std() < 40
    assert sum(result.before.values()) < 2


def test_keyword_model(assets: Path) -> None:
    graph = load(assets / "matchboxnet_3x2x64_all35_bn.onnx")
    found = input_statistics(graph, "mfcc", CORRELATION)
    assert found is not None
    # Decibels: the first cepstral coefficient is far below 0, and varies most.
    assert found.mean[0] == pytest.approx(-165, abs=5)
    assert found.deviation.argmax() == 0
