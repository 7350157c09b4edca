"""How many bits each weight gets: by what fewer bits of it alone do to the network's result.

Each weight is coded without training at every width, and the divergence from the float network
measured on a few batches with it in the float one's place; in large networks, where that would take
hours, it is estimated by derivatives. Bits are then taken away where that costs least per bit
saved, until the budget is met (a greedy solution of the knapsack, exact on the convex parts of the
curves). Zhen et al., arXiv:2210.09188, name such allocation among their ablations; how they choose
was not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onnx_intq.codebook import code
from onnx_intq.progress import Tick
from onnx_intq.training_data import Batch
from onnx_intq.training_loss import Objective
from onnx_intq.training_network import TrainedNetwork, WeightPlace
from onnx_intq.transform import IntqError

WIDTHS = range(1, 9)
MEASURABLE = 2_000_000
"""Numbers in all weights together up to which costs are measured."""
PROBES = 4
"""Random derivatives per batch, for estimates."""
NO_LOSS = 1e-3
"""Divergence, in nats, up to which a width counts as free of loss."""
Costs = Mapping[str, npt.NDArray[np.float64]]
"""What 1 to 8 bits of each weight alone cost, by key: [8]."""


def widths(
    places: Mapping[str, WeightPlace], bits: int, overrides: Sequence[tuple[str, int]]
) -> dict[str, int]:
    """The width of each weight: `bits`, or that of the last pattern that names one of its nodes.

    Raises:
        IntqError: A pattern names no node that has a weight.
    """
    found = dict.fromkeys(places, bits)
    for pattern, width in overrides:
        keys = [k for k, place in places.items() if _matches(place, pattern)]
        if not keys:
            example = next(iter(places.values())).site.nodes[0]
            raise IntqError(
                f"no node matches {pattern!r}; expected names or patterns of nodes that have "
                f"weights, such as {example!r}; correct it"
            )
        found |= dict.fromkeys(keys, width)
    return found


def costs_of(
    network: TrainedNetwork,
    objective: Objective,
    batches: Sequence[Batch],
    seed: int,
    tick: Tick | None = None,
) -> Costs:
    """What 1 to 8 bits of each weight alone cost: measured, or estimated in large networks.

    Args:
        network: Its weights are coded without training.
        objective: 0 for the float network.
        batches: A few.
        seed: Of the estimates.
        tick: Called as work proceeds.
    """
    total = sum(place.site.constant.values.size for place in network.weights.values())
    if total <= MEASURABLE:
        return measured_costs(network, objective, batches, tick)
    return estimated_costs(network, objective, batches, seed, tick)


def estimated_costs(
    network: TrainedNetwork,
    objective: Objective,
    batches: Sequence[Batch],
    seed: int,
    tick: Tick | None = None,
) -> Costs:
    """The second-order estimate of `measured_costs`, by `PROBES` backward passes per batch."""
    generator = torch.Generator().manual_seed(seed)
    sites = {key: place.site for key, place in network.weights.items()}
    floats = {key: torch.from_numpy(site.constant.values) for key, site in sites.items()}
    changes = {key: [_coded(network, key, bits) - floats[key] for bits in WIDTHS] for key in sites}
    values = {k: w.to(network.device, copy=True).requires_grad_() for k, w in floats.items()}
    sums = {key: np.zeros(len(WIDTHS)) for key in sites}
    for number, batch in enumerate(batches):
        for _ in range(PROBES):
            probe = objective.probe(batch, values, generator)
            found = torch.autograd.grad(probe, list(values.values()), materialize_grads=True)
            for key, gradient in zip(values, found, strict=True):
                flat = gradient.cpu().reshape(-1)
                sums[key] += [float(torch.dot(flat, c.reshape(-1))) ** 2 for c in changes[key]]
        if tick:
            tick(number + 1, len(batches))
    return {key: total / (PROBES * len(batches)) for key, total in sums.items()}


def measured_costs(
    network: TrainedNetwork,
    objective: Objective,
    batches: Sequence[Batch],
    tick: Tick | None = None,
) -> Costs:
    """What 1 to 8 bits of each weight alone add to the loss of a few batches."""
    found = {}
    for number, key in enumerate(network.weights):
        coded = (_coded(network, key, bits) for bits in WIDTHS)
        costs = [_mean_loss(network, objective, batches, key, each) for each in coded]
        found[key] = np.array(costs)
        if tick:
            tick(number + 1, len(network.weights))
    return found


def allocate(
    costs: Costs, sizes: Mapping[str, int], budget: float, fixed: Mapping[str, int]
) -> dict[str, int]:
    """Widths whose sum over all weights is at most `budget` of 8 bits each.

    Args:
        costs: From `measured_costs`.
        sizes: Numbers of each weight, by key.
        budget: A share, above 0.
        fixed: Widths that are not chosen, by key.

    Raises:
        IntqError: The budget cannot be met.
    """
    bits = {key: fixed.get(key, WIDTHS[-1]) for key in sizes}
    allowed = budget * WIDTHS[-1] * sum(sizes.values())
    curves = {key: np.maximum.accumulate(costs[key][::-1])[::-1] for key in sizes}
    while sum(sizes[key] * width for key, width in bits.items()) > allowed:
        steps = [
            s for k in sizes if k not in fixed for s in _steps(curves[k], k, bits[k], sizes[k])
        ]
        if not steps:
            raise IntqError(
                f"budget {budget:g} of 8 bits per weight cannot be met, with one bit for each "
                "weight that has no override; expected more; raise --budget"
            )
        _, key, width = min(steps)
        bits[key] = width
    return bits


def free_at_one_bit(costs: Costs) -> list[str]:
    """The weights of which one bit alone costs next to nothing."""
    return [key for key, curve in costs.items() if curve[0] <= NO_LOSS]


def _steps(
    curve: npt.NDArray[np.float64], key: str, bits: int, size: int
) -> list[tuple[float, str, int]]:
    """(Cost per bit saved, weight, width) of every lower width."""
    now = curve[bits - 1]
    return [
        (float(curve[width - 1] - now) / (size * (bits - width)), key, width)
        for width in range(bits - 1, 0, -1)
    ]


def _coded(network: TrainedNetwork, key: str, bits: int) -> Tensor:
    site = network.weights[key].site
    return torch.from_numpy(code(site.constant.values, site.axis, bits, "lloyd").dequantized())


def _mean_loss(
    network: TrainedNetwork,
    objective: Objective,
    batches: Sequence[Batch],
    key: str,
    weight: Tensor,
) -> float:
    values = {key: weight.to(network.device)}
    with torch.no_grad():
        losses = [objective.losses(batch, values).double() for batch in batches]
    return float(torch.cat(losses).mean())


def _matches(place: WeightPlace, pattern: str) -> bool:
    names = [*place.site.nodes, place.site.name, place.key]
    return any(fnmatchcase(name, pattern) for name in names)
