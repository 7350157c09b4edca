"""Zero-shot data: inputs optimised until the network's BatchNorms see the statistics they hold.

Q-ASR section 2.3: for every BatchNormalization, the KL divergence between the Gaussian of its
running statistics and the Gaussian of its input under the synthetic batch, minimised over the
input by Adam. Only the ONNX file is needed.

Method "kl" moves the white noise behind a smooth input (`onnx_intq.latent`), method "qasr" the
input itself. On quartznet15x5 the loss, summed over 93 BatchNorms, is 2.7 for real speech; "kl"
comes to 10 in 30 steps, values moved one by one to 17 in 60.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnx_intq.feeds import Batch, TensorSpec
from onnx_intq.frontend import Frontend
from onnx_intq.graph import constant, metadata, require_float32
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
        method: "kl", "qasr" or "random".
        batches: Independent batches; number k is drawn from seed + k.
        batch_size: Samples in a batch, where the model leaves it open.
        frames: Length of the time axis, where the model leaves it open.
        steps: Steps of Adam per batch, at most.
        lr: Its first learning rate.
        correlation: Of neighbouring values in the input, for method "kl".
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
    "random": Recipe(method="random", batches=2, batch_size=8, steps=0, spread=3.0),
}
"""The defaults of each method; "qasr" is the paper's recipe, "random" the control."""


@dataclass(frozen=True)
class Norm:
    """A BatchNormalization's running statistics, and where its input is found.

    Attributes:
        name: Of the node.
        tap: Name of the tensor it reads.
        mean, variance: float32 [channels]; the variance includes the node's epsilon, so that dead
            channels (variance 0) weigh no more than others.
        epsilon: Added to the variance of the synthetic batch too.
    """

    name: str
    tap: str
    mean: Tensor
    variance: Tensor
    epsilon: float


@dataclass(frozen=True)
class Result:
    """One synthetic batch and how well it fits.

    Attributes:
        batch: The feeds, one array per input.
        before, after: KL divergence per BatchNorm, nats per channel, in graph order.
        losses: Their sum at every step.
    """

    batch: Batch
    before: dict[str, float]
    after: dict[str, float]
    losses: list[float]


def synthesize(
    graph: gs.Graph, recipe: Recipe, *, device: str = "cpu", progress: Tick | None = None
) -> Iterator[Result]:
    """Make `recipe.batches` batches, one by one.

    Raises:
        IntqError: The model has no BatchNormalization (methods kl and qasr), is not float32, has
            dynamic axes other than batch and time, or the device is absent.
    """
    require_float32(graph)
    device = _device(device)
    norms = batch_norms(graph, device)
    if not norms and recipe.method != "random":
        raise IntqError(
            "the model has no BatchNormalization to match; expected at least one; export it with "
            "BatchNormalization kept, or quantize it with real feeds, --data"
        )
    net = TorchGraph(graph, taps=[norm.tap for norm in norms]).to(device)
    length = max(recipe.steps, 1)
    normalized = _is_normalized(graph)
    for index in range(recipe.batches):
        latents, lengths = _start(specs(graph), recipe, recipe.seed + index, normalized)
        search = _Search(
            {
                name: replace(latent, noise=latent.noise.to(device))
                for name, latent in latents.items()
            },
            {name: tensor.to(device) for name, tensor in lengths.items()},
            recipe,
        )

        def tick(step: int, done: int = index * length) -> None:
            if progress:
                progress(done + step + 1, recipe.batches * length)

        yield _optimise(net, norms, search, recipe.steps, tick)


def batch_norms(graph: gs.Graph, device: str = "cpu") -> list[Norm]:
    """The BatchNormalization nodes whose statistics are constant, in graph order."""
    found = []
    for node in graph.nodes:
        mean, variance = constant(node, 3), constant(node, 4)
        if node.op != "BatchNormalization" or mean is None or variance is None:
            continue
        epsilon = float(node.attrs.get("epsilon", 1e-5))
        statistics = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, variance))
        mu, var = statistics
        found.append(Norm(node.name, node.inputs[0].name, mu, var + epsilon, epsilon))
    return found


def divergence(x: Tensor, norm: Norm) -> Tensor:
    """KL divergence of the Gaussian of `x` from that of `norm`, averaged over channels, in nats.

    Args:
        x: The BatchNorm's input [batch, channels, ...].
        norm: What it should look like.
    """
    rows = x.transpose(1, -1).flatten(0, -2)  # channels last, as TorchGraph keeps them: no copy
    mean = rows.mean(0)
    variance = (rows - mean).square().mean(0) + norm.epsilon
    apart = (norm.variance + (norm.mean - mean).square()) / variance
    return 0.5 * (torch.log(variance / norm.variance) - 1 + apart).mean()


def _start(
    inputs: list[TensorSpec], recipe: Recipe, seed: int, normalized: bool
) -> tuple[dict[str, Latent], dict[str, Tensor]]:
    """The floating-point inputs, where they start from, and the lengths."""
    generator = torch.Generator().manual_seed(seed)
    latents: dict[str, Latent] = {}
    lengths: dict[str, Tensor] = {}
    for spec in inputs:
        shape = _shape(spec, recipe)
        if spec.dtype.kind == "f" and recipe.method == "kl":
            axis = time_axis(spec) if normalized else None
            latents[spec.name] = correlated(shape, recipe.correlation, generator, axis)
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


def _is_normalized(graph: gs.Graph) -> bool:
    """Whether the recorded front end brings every feature to mean 0 and deviation 1 over time."""
    text = metadata(graph).get(FRONTEND_KEY)
    return text is not None and Frontend.from_json(text).normalize == "per_feature"


def time_axis(spec: TensorSpec) -> int:
    """The last axis of open length, or the last of all where only the batch is open."""
    dynamic = [i for i, size in enumerate(spec.shape) if i and not isinstance(size, int)]
    return dynamic[-1] if dynamic else len(spec.shape) - 1


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
        return {name: latent.value() for name, latent in self._latents.items()} | self._lengths

    def step(self, loss: Tensor) -> bool:
        """Take one step; return whether more are worth while."""
        value = loss.item()
        if not math.isfinite(value):
            raise IntqError(
                f"the BatchNorm loss became {value} at step {len(self.losses)}; expected a finite "
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
    net: TorchGraph, norms: list[Norm], search: _Search, steps: int, tick: Callable[[int], object]
) -> Result:
    before: dict[str, float] = {}
    for step in range(steps):
        values = net(search.feeds())
        parts = torch.stack([divergence(values[norm.tap], norm) for norm in norms])
        before = before or _named(norms, parts)
        tick(step)
        if not search.step(parts.sum()):
            break
    search.best()
    with torch.no_grad():
        feeds = search.feeds()
        values = net(feeds)
        after = torch.stack(
            [divergence(values[norm.tap], norm) for norm in norms] or [torch.zeros(())]
        )
    batch = {name: tensor.detach().cpu().numpy() for name, tensor in feeds.items()}
    return Result(batch, before or _named(norms, after), _named(norms, after), search.losses)


def _named(norms: list[Norm], parts: Tensor) -> dict[str, float]:
    return dict(zip((norm.name for norm in norms), parts.tolist(), strict=False))


def _device(name: str) -> str:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise IntqError(f"device {name!r}: no CUDA device found; expected one; use --device cpu")
    return name
