"""Zero-shot data: inputs optimised until the network takes them for those it was trained on.

Q-ASR section 2.3: for every BatchNormalization, the KL divergence between the Gaussian of its
running statistics and the Gaussian of its input under the synthetic batch, minimised over the
input by Adam (`onnx_intq.divergence`). Where there is no BatchNormalization, attention tells
(`onnx_intq.entropy`). Only the ONNX file is needed.

Method "kl" moves the white noise behind a smooth input (`onnx_intq.latent`), method "qasr" the
input itself. On quartznet15x5 the loss, summed over 93 BatchNorms, is 2.7 for real speech; "kl"
comes to 10 in 30 steps, values moved one by one to 17 in 60.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnx_intq.divergence import Divergences, batch_norms
from onnx_intq.entropy import Entropies, attentions, fit_scale
from onnx_intq.feeds import Batch, TensorSpec
from onnx_intq.frontend import Frontend
from onnx_intq.graph import metadata, require_float32
from onnx_intq.input_statistics import Statistics, input_statistics, stretched
from onnx_intq.latent import Latent, correlated, uniform
from onnx_intq.progress import Tick
from onnx_intq.samples import specs
from onnx_intq.speech import FRONTEND_KEY
from onnx_intq.torch_graph import TorchGraph
from onnx_intq.transform import IntqError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How synthetic data is made.

    Attributes:
        method: "kl", "qasr", "entropy" or "random".
        batches: Independent batches; number k is drawn from seed + k.
        batch_size: Samples in a batch, where the model leaves it open.
        frames: Length of the time axis, where the model leaves it open.
        steps: Steps of Adam per batch, at most.
        lr: Its first learning rate.
        correlation: Of neighbouring values in the input, for methods "kl" and "entropy".
        spread: Half-width of the uniform distribution the input starts from, for the others.
        patience: Steps without 1 % improvement after which a batch is done.
        seed: Of the first batch.
    """

    method: str = "kl"
    batches: int = 6
    batch_size: int = 4
    frames: int = 320
    steps: int = 30
    lr: float = 0.05
    correlation: float = 0.9
    spread: float = 0.3
    patience: int = 20
    seed: int = 0


RECIPES = {
    "kl": Recipe(),
    "qasr": Recipe(method="qasr", batches=20, batch_size=8, frames=500, steps=200, patience=200),
    "entropy": Recipe(method="entropy", batches=4, steps=4),
    "random": Recipe(method="random", batches=2, batch_size=8, steps=0, spread=3.0),
}
"""The defaults of each method; "qasr" is the paper's recipe, "random" the control."""


class Objective(Protocol):
    """What synthesis makes small: the sum of one number per node."""

    @property
    def measure(self) -> str:
        """What the numbers are: "divergence" or "negative_entropy"."""

    @property
    def names(self) -> list[str]:
        """Of the nodes."""

    @property
    def taps(self) -> list[str]:
        """The tensors that `parts` looks at."""

    def parts(self, values: Mapping[str, Tensor]) -> Tensor:
        """The numbers, float32 [nodes]."""


@dataclass(frozen=True)
class Result:
    """One synthetic batch and how well it fits.

    Attributes:
        batch: The feeds, one array per input.
        before, after: What was minimised, such as the KL divergence, per node in graph order.
        losses: Their sum at every step.
        measure: What `before` and `after` are: "divergence" or "negative_entropy".
    """

    batch: Batch
    before: dict[str, float]
    after: dict[str, float]
    losses: list[float]
    measure: str = "divergence"


def synthesize(
    graph: gs.Graph, recipe: Recipe, *, device: str = "cpu", progress: Tick | None = None
) -> Iterator[Result]:
    """Make `recipe.batches` batches, one by one.

    Raises:
        IntqError: The model has no BatchNormalization (methods kl and qasr) or no attention (method
            entropy), is not float32, has dynamic axes other than batch and time, or the device is
            absent.
    """
    require_float32(graph)
    device = _device(device)
    objective = _objective(graph, recipe.method, device)
    net = TorchGraph(graph, taps=objective.taps).to(device)
    length = max(recipe.steps, 1)
    normalized = _is_normalized(graph)
    scale = (1.0, 0.0)
    known = {} if normalized or recipe.method != "kl" else _statistics(graph, recipe)
    for index in range(recipe.batches):
        latents, lengths = _start(specs(graph), recipe, index, normalized)
        latents = {name: replace(x, noise=x.noise.to(device)) for name, x in latents.items()}
        lengths = {name: tensor.to(device) for name, tensor in lengths.items()}
        if recipe.method == "entropy" and index == 0 and not normalized:
            scale = fit_scale(_cost(net, objective, latents, lengths))
        latents = _scaled(latents, *scale) | {n: s.start(latents[n]) for n, s in known.items()}
        search = _Search(latents, lengths, recipe)

        def tick(step: int, done: int = index * length) -> None:
            if progress:
                progress(done + step + 1, recipe.batches * length)

        result = _optimise(net, objective, search, recipe.steps, tick)
        yield replace(
            result, batch={**result.batch, **{n: stretched(result.batch[n]) for n in known}}
        )


def _statistics(graph: gs.Graph, recipe: Recipe) -> dict[str, Statistics]:
    """Of the inputs whose scale no front end says, but the first BatchNorm."""
    found = {t.name: input_statistics(graph, t.name, recipe.correlation) for t in graph.inputs}
    return {name: statistics for name, statistics in found.items() if statistics is not None}


def _objective(graph: gs.Graph, method: str, device: str) -> Objective:
    if method == "random":
        return Divergences([])
    if method == "entropy":
        if not (found := attentions(graph)):
            raise IntqError(
                "the model has no attention, MatMul(Softmax(...), ...), to vary; expected at least "
                "one; use --method kl if it has BatchNormalization, or real feeds, --data"
            )
        return Entropies(found)
    if not (norms := batch_norms(graph, device)):
        raise IntqError(
            "the model has no BatchNormalization to match; expected at least one; export it with "
            "BatchNormalization kept; for a transformer use --method entropy; or quantize it with "
            "real feeds, --data"
        )
    return Divergences(norms)


def _cost(
    net: TorchGraph, objective: Objective, latents: dict[str, Latent], lengths: dict[str, Tensor]
) -> Callable[[float, float], float]:
    """What a gain and an offset of all inputs cost; infinity where numbers overflow."""

    def cost(gain: float, offset: float) -> float:
        with torch.no_grad():
            scaled = _scaled(latents, gain, offset)
            value = objective.parts(net(_values(scaled) | lengths)).sum().item()
        return value if math.isfinite(value) else math.inf

    return cost


def _scaled(latents: dict[str, Latent], gain: float, offset: float) -> dict[str, Latent]:
    return {name: replace(x, gain=gain, offset=offset) for name, x in latents.items()}


def _values(latents: dict[str, Latent]) -> dict[str, Tensor]:
    return {name: latent.value() for name, latent in latents.items()}


def _start(
    inputs: list[TensorSpec], recipe: Recipe, index: int, normalized: bool
) -> tuple[dict[str, Latent], dict[str, Tensor]]:
    """The floating-point inputs of batch `index`, where they start from, and the lengths."""
    generator = torch.Generator().manual_seed(recipe.seed + index)
    latents: dict[str, Latent] = {}
    lengths: dict[str, Tensor] = {}
    for spec in inputs:
        shape = _shape(spec, recipe)
        if spec.dtype.kind == "f" and recipe.method in {"kl", "entropy"}:
            axis = time_axis(spec) if normalized else None
            latent = correlated(shape, recipe.correlation, generator, axis)
            if recipe.method == "entropy" and index:
                latent = replace(latent, padding=_padding(spec, generator))
            latents[spec.name] = latent
        elif spec.dtype.kind == "f":
            latents[spec.name] = uniform(shape, recipe.spread, generator)
        elif spec.is_lengths:
            lengths[spec.name] = torch.full(shape, recipe.frames, dtype=torch.int64)
        else:
            raise IntqError(
                f"input {spec} holds integers that cannot be optimised; expected features and "
                "lengths; quantize it with real feeds, --data"
            )
    return latents, lengths


def _padding(spec: TensorSpec, generator: torch.Generator) -> tuple[int, int] | None:
    """Where a spectrogram of fixed length ends: between 20 and 80 % of it."""
    axis = time_axis(spec)
    size = spec.shape[axis]
    if len(spec.shape) != 3 or not isinstance(size, int):
        return None
    share = 0.2 + 0.6 * torch.rand((), generator=generator).item()
    return axis, max(round(share * size), 1)


def _is_normalized(graph: gs.Graph) -> bool:
    """Whether the recorded front end brings every feature to mean 0 and deviation 1 over time."""
    text = metadata(graph).get(FRONTEND_KEY)
    return text is not None and Frontend.from_json(text).normalize == "per_feature"


def time_axis(spec: TensorSpec) -> int:
    """The last axis of open length; where only the batch is open, the longest of the others."""
    dynamic = [i for i, size in enumerate(spec.shape) if i and not isinstance(size, int)]
    if dynamic:
        return dynamic[-1]
    lengths = [(size, axis) for axis, size in enumerate(spec.shape) if axis]
    return max(lengths)[1] if lengths else 0


def _shape(spec: TensorSpec, recipe: Recipe) -> tuple[int, ...]:
    dynamic = [i for i, size in enumerate(spec.shape) if not isinstance(size, int)]
    if not spec.shape or any(axis not in (0, dynamic[-1]) for axis in dynamic):
        raise IntqError(
            f"input {spec} has dynamic axes other than batch and time; expected at most these two; "
            "fix the others in the export, or quantize it with real feeds, --data"
        )
    sizes = {0: recipe.batch_size} | {axis: recipe.frames for axis in dynamic if axis}
    return tuple(
        size if isinstance(size, int) else sizes[axis] for axis, size in enumerate(spec.shape)
    )


class _Search:
    """Adam over the free inputs of one batch; keeps the best input it has seen."""

    def __init__(
        self, latents: dict[str, Latent], lengths: dict[str, Tensor], recipe: Recipe
    ) -> None:
        self._latents, self._lengths, self._recipe = latents, lengths, recipe
        self._free = [latent.noise.requires_grad_() for latent in latents.values()]
        self._adam = torch.optim.Adam(self._free, lr=recipe.lr)
        self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._adam, patience=25, min_lr=1e-4
        )
        self.losses: list[float] = []
        self._best = [tensor.detach().clone() for tensor in self._free]
        self._milestone, self._milestone_step = math.inf, 0

    def feeds(self) -> dict[str, Tensor]:
        """The network's inputs, differentiable in what the search moves."""
        return _values(self._latents) | self._lengths

    def step(self, loss: Tensor) -> bool:
        """Take one step; return whether more are worth while."""
        value = loss.item()
        if not math.isfinite(value):
            raise IntqError(
                f"the loss became {value} at step {len(self.losses)}; expected a finite "
                "value; lower --lr"
            )
        if value < min(self.losses, default=math.inf):
            self._best = [tensor.detach().clone() for tensor in self._free]
        self.losses.append(value)
        if value < 0.99 * self._milestone:
            self._milestone, self._milestone_step = value, len(self.losses)
        self._schedule(value)
        self._adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        return len(self.losses) - self._milestone_step < self._recipe.patience

    def _schedule(self, value: float) -> None:
        if self._recipe.method == "qasr":
            self._plateau.step(value)
            return
        done = len(self.losses) / (self._recipe.steps + 1)
        for group in self._adam.param_groups:
            group["lr"] = self._recipe.lr * (0.5 + 0.5 * math.cos(math.pi * done))

    def best(self) -> None:
        """Put the best input back in place."""
        with torch.no_grad():
            for tensor, best in zip(self._free, self._best, strict=True):
                tensor.copy_(best)


def _optimise(
    net: TorchGraph,
    objective: Objective,
    search: _Search,
    steps: int,
    tick: Callable[[int], object],
) -> Result:
    before: dict[str, float] = {}
    for step in range(steps):
        parts = objective.parts(net(search.feeds()))
        before = before or _named(objective, parts)
        tick(step)
        if not search.step(parts.sum()):
            break
    search.best()
    feeds = search.feeds()
    batch = {name: tensor.detach().cpu().numpy() for name, tensor in feeds.items()}
    after: dict[str, float] = {}
    if objective.names:
        with torch.no_grad():
            after = _named(objective, objective.parts(net(feeds)))
    return Result(batch, before or after, after, search.losses, objective.measure)


def _named(objective: Objective, parts: Tensor) -> dict[str, float]:
    return dict(zip(objective.names, parts.tolist(), strict=True))


def _device(name: str) -> str:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise IntqError(f"device {name!r}: no CUDA device found; expected one; use --device cpu")
    return name
