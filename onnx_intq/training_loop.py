"""The training loop: AdamW on the quantizers and biases, validated on the weights as stored.

Law: the result is never worse than the start on the held-out data, for the start is a candidate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from onnx_intq.codebook import CodedWeight
from onnx_intq.distributed import Group
from onnx_intq.quantized_weights import HardWeights, QuantizedWeights
from onnx_intq.training_data import Samples, collate
from onnx_intq.training_loss import Objective
from onnx_intq.training_network import Values
from onnx_intq.training_plan import Plan

EPSILON = 1e-3
"""Of AdamW, as a share of a tensor's root mean square gradient: what is below is rounding noise."""
SMALLEST = 1e-20
"""In place of a smaller size of a gradient."""
STATE = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW knows of each parameter."""

Save = Callable[[Mapping[str, Tensor]], object]
Tick = Callable[[int, int], object]


@dataclass(kw_only=True)
class Progress:
    """How far a training has come.

    Attributes:
        step: Steps done.
        best: The weights with the least loss so far.
        best_loss: Theirs on the held-out data.
        best_step: After so many steps.
        history: (steps, loss on the held-out data) of every validation.
        stopped: Why it ended before its last step, None if it did not.
    """

    step: int = 0
    best: HardWeights
    best_loss: float = math.inf
    best_step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    stopped: str | None = None


class Trainer:
    """Trains the quantizers of a network.

    Args:
        weights: What is trained.
        objective: What is made small.
        data: Samples to train on, and held-out ones.
        plan: How to train.
        group: The processes.
        device: Of torch.
    """

    def __init__(
        self,
        weights: QuantizedWeights,
        objective: Objective,
        data: tuple[Samples, Samples],
        plan: Plan,
        group: Group,
        device: str,
    ) -> None:
        self._weights, self._objective, self._plan = weights, objective, plan
        (self._train, self._held), self._group, self._device = data, group, device
        self._names = list(weights.parameters())
        self._parameters = list(weights.parameters().values())
        self._adam = torch.optim.AdamW(
            weights.groups(plan.rate), weight_decay=0, eps=EPSILON, fused=True
        )
        self._rates = [group["lr"] for group in self._adam.param_groups]
        self.progress = Progress(best=weights.hard())

    def run(self, *, minutes: float = math.inf, save: Save | None = None, tick: Tick) -> Progress:
        """Train to the end, until the time is over, or until Ctrl-C.

        Args:
            minutes: Wall time after which no step is begun.
            save: Called with the state after every validation.
            tick: Called after every step.
        """
        end, found = time.monotonic() + 60 * minutes, self.progress
        try:
            if not found.history:
                self._validate()
            while found.step < self._plan.steps:
                if self._group.any(time.monotonic() > end):
                    self._stop(f"{minutes:g} minutes were over", save)
                    break
                if not self._step(found.step):
                    found.stopped = f"the loss became infinite or NaN at step {found.step + 1}"
                    break
                found.step += 1
                tick(found.step, self._plan.steps)
                if found.step % self._plan.validate_every == 0 or found.step == self._plan.steps:
                    self._validate()
                    if save:
                        save(self.state())
        except KeyboardInterrupt:
            found.stopped = "interrupted"
        return found

    def _stop(self, why: str, save: Save | None) -> None:
        """Validate what there is; the checkpoint is that of a training that goes on."""
        if save:
            save(self.state())
        if self.progress.history[-1][0] != self.progress.step:
            self._validate()
        self.progress.stopped = why

    def _validate(self) -> None:
        found, hard = self.progress, self._weights.hard()
        values = hard.values(self._device)
        loss = held_out_loss(self._objective, self._held, values, self._group, self._device)
        found.history.append((found.step, loss))
        if loss < found.best_loss:
            found.best, found.best_loss, found.best_step = hard, loss, found.step

    def _step(self, step: int) -> bool:
        """One step of the optimizer; False, and no step, where the gradient is not finite."""
        plan, quantize = self._plan, step % self._plan.quantize_every == 0
        values = self._weights.values(step / plan.steps, quantize=quantize)
        if quantize and plan.quantize_every > 1:
            self._weights.keep_roundings(values)
        self._adam.zero_grad()
        self._backward(step, values)
        trained = [p for p in self._parameters if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._group.sum([p.grad for p in trained if p.grad is not None])
        if not _normalized([p.grad for p in trained if p.grad is not None]):
            return False
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * plan.rate_at(step)
        self._adam.step()
        self._weights.after_step((step + 1) / plan.steps)
        return True

    def _backward(self, step: int, values: Values) -> None:
        """Add the gradients of this process's share of the batch."""
        samples = self._train.at(step)
        mine = self._group.share(samples)
        loss = torch.zeros((), device=self._device)
        if mine:
            batch, kind = collate(mine, samples, self._device), torch.device(self._device).type
            with torch.autocast(kind, torch.bfloat16, enabled=self._plan.bfloat16):
                losses = self._objective.losses(batch, values)
            share = sum(s.rows for s in mine) / sum(s.rows for s in samples)
            loss = loss + losses.mean() * share
        if (penalty := self._weights.penalty()) is not None:
            loss = loss + penalty / self._group.ranks
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed training needs, as tensors."""
        found, state = self.progress, self._weights.state()
        for name, parameter in zip(self._names, self._parameters, strict=True):
            known = self._adam.state.get(parameter, {})
            state |= {f"adam {kind}:{name}": known[kind] for kind in STATE if kind in known}
            state[f"trains:{name}"] = torch.tensor(parameter.requires_grad)
        for key, coded in found.best.coded.items():
            state[f"best stored:{key}"] = torch.from_numpy(coded.stored)
            state[f"best scales:{key}"] = torch.from_numpy(np.asarray(coded.scales))
        for key, bias in found.best.biases.items():
            state[f"best biases:{key}"] = torch.from_numpy(bias)
        numbers = [found.step, found.best_step, found.best_loss]
        state["progress"] = torch.tensor(numbers, dtype=torch.float64)
        state["history"] = torch.tensor(found.history, dtype=torch.float64)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where the training was whose `state` this is."""
        self._weights.restore({n: t for n, t in state.items() if _is_weight(n)})
        for name, parameter in zip(self._names, self._parameters, strict=True):
            known = {k: state[f"adam {k}:{name}"] for k in STATE if f"adam {k}:{name}" in state}
            if known:
                self._adam.state[parameter] = {k: t.to(self._device) for k, t in known.items()}
            parameter.requires_grad_(bool(state[f"trains:{name}"]))
        step, best_step, best_loss = state["progress"].tolist()
        found = self.progress
        found.step, found.best_step, found.best_loss = int(step), int(best_step), best_loss
        found.history = [(int(done), loss) for done, loss in state["history"].tolist()]
        found.best = HardWeights(
            coded={k: _coded(state, k, like) for k, like in found.best.coded.items()},
            biases={k: state[f"best biases:{k}"].numpy() for k in found.best.biases},
        )


def _normalized(gradients: Sequence[Tensor]) -> bool:
    """Bring each gradient to a root mean square of 1, in place; False if one is not finite.

    AdamW takes no notice of a gradient's size but for its epsilon, and sizes differ by orders of
    magnitude between layers. It also bounds what one unusual batch can do.
    """
    norms = torch.stack([gradient.square().mean().sqrt() for gradient in gradients])
    if not bool(norms.isfinite().all()):
        return False
    for gradient, norm in zip(gradients, norms.clamp(min=SMALLEST), strict=True):
        gradient.div_(norm)
    return True


def held_out_loss(
    objective: Objective, held: Samples, values: Values, group: Group, device: str
) -> float:
    """Mean loss of held-out samples with `values` as weights, each process doing its share."""
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for samples in group.share(list(held.in_order())):
            losses = objective.losses(collate(samples, samples, device), values)
            rows = sum(sample.rows for sample in samples)
            sums += torch.tensor([losses.double().mean().item() * rows, rows])
    group.sum([sums])
    return float(sums[0] / sums[1])


def _is_weight(name: str) -> bool:
    """Whether an entry of the state is one of the weights, rather than of the loop."""
    kind = name.partition(":")[0]
    return kind.split()[0] not in {"adam", "best", "trains", "progress", "history"}


def _coded(state: Mapping[str, Tensor], key: str, like: CodedWeight) -> CodedWeight:
    return CodedWeight(
        stored=state[f"best stored:{key}"].numpy(),
        scales=state[f"best scales:{key}"].numpy(),
        axis=like.axis,
        bits=like.bits,
    )
