"""Widths under a budget."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq import bit_allocation
from onnx_intq.bit_allocation import (
    allocate,
    costs_of,
    estimated_costs,
    free_at_one_bit,
    measured_costs,
    widths,
)
from onnx_intq.quantize import prepared
from onnx_intq.training_data import Batch
from onnx_intq.training_loss import GraphObjective, heads
from onnx_intq.training_network import TrainedNetwork, weight_places
from onnx_intq.transform import IntqError

CURVES = st.lists(st.floats(0, 10), min_size=8, max_size=8).map(np.array)


@given(st.lists(st.tuples(CURVES, st.integers(1, 50)), min_size=1, max_size=5), st.data())
def test_the_budget_is_met(weights: list[tuple[np.ndarray, int]], data: st.DataObject) -> None:
    costs = {str(i): curve for i, (curve, _) in enumerate(weights)}
    sizes = {str(i): size for i, (_, size) in enumerate(weights)}
    budget = data.draw(st.floats(0.125, 1))
    bits = allocate(costs, sizes, budget, {})
    assert sum(sizes[key] * width for key, width in bits.items()) <= budget * 8 * sum(
        sizes.values()
    )
    assert all(1 <= width <= 8 for width in bits.values())


def test_bits_are_taken_where_they_cost_least() -> None:
    falling = np.array([4.0**-width for width in range(8)])
    costs = {"tender": falling, "tough": 1e-3 * falling}
    sizes = {"tender": 10, "tough": 10}
    bits = allocate(costs, sizes, 0.5, {})
    assert bits == {"tender": 6, "tough": 2} or bits == {"tender": 7, "tough": 1}
    for other in product(range(1, 9), repeat=2):  # no other widths within the budget are better
        if sum(other) <= 8:
            total = sum(costs[k][b - 1] for k, b in zip(costs, other, strict=True))
            assert total >= 0.99 * sum(costs[key][b - 1] for key, b in bits.items())


def test_overridden_widths_stay() -> None:
    costs = {"a": np.ones(8), "b": np.ones(8)}
    assert allocate(costs, {"a": 1, "b": 1}, 0.6, {"a": 8}) == {"a": 8, "b": 1}
    with pytest.raises(IntqError, match=r"budget 0\.5 of 8 bits per weight cannot be met"):
        allocate(costs, {"a": 1, "b": 1}, 0.5, {"a": 8})


def test_the_last_override_wins(tiny: Path) -> None:
    places = {p.key: p for p in weight_places({"model": prepared(tiny)})}
    first, second = places
    node = places[first].site.nodes[0]
    assert widths(places, 5, ()) == {first: 5, second: 5}
    assert widths(places, 5, (("*", 3), (node, 1))) == {first: 1, second: 3}
    with pytest.raises(IntqError, match="no node matches 'nothing'; expected names or patterns"):
        widths(places, 5, (("nothing", 3),))


def judged(path: Path) -> tuple[TrainedNetwork, GraphObjective, Batch]:
    model = prepared(path)
    found = heads(model)
    network = TrainedNetwork({"model": model}, {"model": [found[0].tensor]}, "cpu")
    objective = GraphObjective(network=network, heads=found, task=0, distill=1)
    feed = torch.randn(4, 4, 50, generator=torch.Generator().manual_seed(0))
    batch = Batch(feed={"audio_signal": feed}, frames=torch.full((4,), 50), targets=())
    return network, objective, batch


def test_fewer_bits_are_measured_to_cost_more(tiny: Path) -> None:
    network, objective, batch = judged(tiny)
    ticks: list[tuple[int, int]] = []
    costs = measured_costs(network, objective, [batch], lambda *t: ticks.append(t))
    again = measured_costs(network, objective, [batch])
    assert all(np.array_equal(costs[key], again[key]) for key in network.weights)
    assert ticks == [(1, 2), (2, 2)]
    for curve in costs.values():
        assert curve.shape == (8,)
        assert curve[0] > curve[3] > curve[7] > 0
    assert free_at_one_bit(costs) == []
    assert free_at_one_bit({"a": np.zeros(8)}) == ["a"]


def test_estimates_are_near_what_is_measured(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, objective, batch = judged(tiny)
    measured = costs_of(network, objective, [batch], 0)
    monkeypatch.setattr(bit_allocation, "MEASURABLE", 0)
    monkeypatch.setattr(bit_allocation, "PROBES", 100)
    ticks: list[tuple[int, int]] = []
    estimated = costs_of(network, objective, [batch], 0, lambda *t: ticks.append(t))
    assert ticks == [(1, 1)]
    for key, curve in measured.items():
        np.testing.assert_allclose(estimated[key][2:], curve[2:], rtol=0.6)
    again = estimated_costs(network, objective, [batch], 0)
    assert all(np.array_equal(again[key], estimated[key]) for key in again)
