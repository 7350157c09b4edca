"""The quantizers of a network."""

from pathlib import Path

import numpy as np
import pytest
import torch

from onnx_intq.quantize import prepared
from onnx_intq.quantized_weights import RATES, QuantizedWeights, untrained
from onnx_intq.training_network import TrainedNetwork


@pytest.fixture
def network(tiny: Path) -> TrainedNetwork:
    return TrainedNetwork({"model": prepared(tiny)}, {}, "cpu")


def weights(network: TrainedNetwork, scheme: str = "gq", bits: int = 3) -> QuantizedWeights:
    return QuantizedWeights(network, scheme, dict.fromkeys(network.weights, bits))


@pytest.mark.parametrize("scheme", ["gq", "s8bqat", "uniform"])
def test_what_is_stored_is_what_is_trained_at_the_end(network: TrainedNetwork, scheme: str) -> None:
    made = weights(network, scheme)
    trained, stored = made.values(1.0), made.hard().values("cpu")
    assert trained.keys() == stored.keys() == network.weights.keys() | network.biases.keys()
    for key, tensor in stored.items():
        torch.testing.assert_close(trained[key].detach(), tensor, rtol=1e-6, atol=1e-7)
    assert (made.penalty() is None) == (scheme != "s8bqat")
    made.after_step(1.0)


def test_each_kind_of_parameter_has_its_rate(network: TrainedNetwork) -> None:
    made = weights(network)
    groups = {group["kind"]: group for group in made.groups(0.01)}
    assert groups.keys() == {"biases", "latent", "log_scale", "theta"}
    (bits,) = {quantizer.bits for quantizer in made.quantizers.values()}
    assert groups["latent"]["lr"] == pytest.approx(0.01 * RATES["latent"] * 2 ** (8 - bits))
    assert groups["theta"]["lr"] == pytest.approx(0.01 * RATES["theta"])
    assert groups["log_scale"]["lr"] == groups["biases"]["lr"] == 0.01
    assert sum(len(group["params"]) for group in groups.values()) == 2 + 3 * 2


def test_between_quantizations_the_last_rounding_is_added(network: TrainedNetwork) -> None:
    made = weights(network)
    first = made.values(0.5, quantize=False)  # there is none yet
    made.keep_roundings(first)
    again = made.values(0.5, quantize=False)
    for key, quantizer in made.quantizers.items():
        torch.testing.assert_close(again[key], first[key], rtol=0, atol=1e-6)
        assert torch.autograd.grad(again[key].sum(), quantizer.latent)[0].all()
    moved = next(iter(made.quantizers))
    with torch.no_grad():
        made.quantizers[moved].latent.add_(0.25)
    change = made.values(0.5, quantize=False)[moved] - first[moved]
    assert (change > 0).all()


def test_state_is_restored(network: TrainedNetwork) -> None:
    made, other = weights(network), weights(network)
    made.keep_roundings(made.values(0.5))
    with torch.no_grad():
        for tensor in made.parameters().values():
            tensor.add_(0.01)
    other.restore({name: tensor.clone() for name, tensor in made.state().items()})
    assert made.state().keys() == other.state().keys()
    assert all(torch.equal(t, other.state()[name]) for name, t in made.state().items())
    fresh = weights(network)
    fresh.restore(weights(network).state())
    assert not any(name.startswith("roundings") for name in fresh.state())


def test_hard_weights_are_a_copy(network: TrainedNetwork) -> None:
    made = weights(network)
    hard = made.hard()
    key, bias = next(iter(made.biases.items()))
    before = hard.biases[key].copy()
    with torch.no_grad():
        bias.add_(1)
    assert np.array_equal(hard.biases[key], before)


def test_without_training_weights_are_uniform(network: TrainedNetwork) -> None:
    hard = untrained(network, dict.fromkeys(network.weights, 2))
    for coded in hard.coded.values():
        assert set(coded.centroids.tolist()) <= {-1, 0, 1}
    assert all(np.array_equal(hard.biases[k], b.numpy()) for k, b in network.biases.items())
