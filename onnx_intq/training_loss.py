"""What the training of a network of one graph makes small: CTC, and distance from the float model.

Every loss is one number per utterance, a mean over its own frames, so that the loss of a batch is
the mean over its utterances however the batch is cut or shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnx_intq.graph import producer
from onnx_intq.training_data import Batch
from onnx_intq.training_network import TrainedNetwork, Values
from onnx_intq.transform import IntqError

MODEL = "model"
"""The part's name, of a network of one graph."""
NORMALISING = {"LogSoftmax", "Softmax"}
MOVING = {"Transpose", "Identity", "Log"}
"""Operators that may stand behind these."""
INNER = 4
"""Tensors inside the network that are compared split it into so many parts."""


class Objective(Protocol):
    """What training makes small."""

    def losses(self, batch: Batch, values: Values) -> Tensor:
        """The loss of each utterance or row, float32 [rows], with `values` as weights."""

    def probe(self, batch: Batch, values: Values, generator: torch.Generator) -> Tensor:
        """A random number whose derivative tells the cost of small changes of the weights.

        Law: the mean, over the generator's numbers, of the square of its derivative in any
        direction is what a step in that direction adds to the mean distance between the results
        and those of the network with `values`, to second order in the step.
        """


@dataclass(frozen=True, kw_only=True)
class Head:
    """A result of a network.

    Attributes:
        tensor: Its name; before a softmax, if there is one.
        axis: Of the classes; None where the result is no distribution.
    """

    tensor: str
    axis: int | None


def heads(graph: gs.Graph) -> list[Head]:
    """The float results of a graph.

    Raises:
        IntqError: There are none.
    """
    found: dict[str, Head] = {}
    for output in graph.outputs:
        if output.dtype == np.float32:
            head = _head(output)
            found.setdefault(head.tensor, head)
    if not found:
        raise IntqError("the model has no float32 output; expected one to train on; export it anew")
    return list(found.values())


def _head(output: gs.Tensor) -> Head:
    maker = producer(output)
    while maker is not None and maker.op in MOVING:
        maker = producer(maker.inputs[0])
    if maker is None or maker.op not in NORMALISING:
        return Head(tensor=output.name, axis=None)
    return Head(tensor=maker.inputs[0].name, axis=int(maker.attrs.get("axis", -1)))


def inner_tensors(graph: gs.Graph, nodes: Sequence[str]) -> list[str]:
    """The outputs of a few of the nodes named, evenly spread."""
    made = {node.name: node.outputs[0].name for node in graph.nodes}
    count = len(nodes)
    places = {i * count // INNER for i in range(1, INNER)} if count >= INNER else set[int]()
    return [made[nodes[place]] for place in sorted(places)]


@dataclass(frozen=True, kw_only=True)
class GraphObjective:
    """CTC and distillation for a network of one graph.

    Attributes:
        network: Runs teacher and student.
        heads: Its results.
        task: Factor of the CTC loss; 0 where there are no transcripts.
        distill: Factor of the divergence from the float model.
        inner: Tensors inside, whose relative squared error is added to that divergence.
        lengths: The integer output that holds the valid frames, if there is one.
    """

    network: TrainedNetwork
    heads: Sequence[Head]
    task: float
    distill: float
    inner: Sequence[str] = ()
    lengths: str | None = None

    def losses(self, batch: Batch, values: Values) -> Tensor:
        """See `Objective`."""
        student = self.network.run(MODEL, batch.feed, values)
        parts = []
        if self.task and batch.targets:
            parts.append(self.task * self._ctc(batch, student))
        if self.distill:
            with torch.no_grad():
                teacher = self.network.run(MODEL, batch.feed, {})
            parts.append(self.distill * self._distance(batch, student, teacher))
        return torch.stack(parts).sum(0)

    def probe(self, batch: Batch, values: Values, generator: torch.Generator) -> Tensor:
        """See `Objective`."""
        outputs = self.network.run(MODEL, batch.feed, values)
        parts = []
        for head in self.heads:
            x = outputs[head.tensor]
            if head.axis is None:
                parts.append(signed(x, generator))
            else:
                valid, x = self._valid(head, batch, outputs), x.movedim(head.axis, -1)
                counted = x if valid is None else x * valid[..., None]
                parts += [sampled(x, valid, generator), signed(counted, generator)]
        return torch.stack(parts).sum()

    def _ctc(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        (head,) = self.heads
        log_probs = F.log_softmax(outputs[head.tensor], -1)
        sizes = torch.tensor([len(each) for each in batch.targets])
        found = F.ctc_loss(
            log_probs.transpose(0, 1),
            torch.cat(batch.targets).to(log_probs.device),
            self._frames(batch, outputs, log_probs.shape[1]),
            sizes,
            blank=log_probs.shape[2] - 1,
            reduction="none",
            zero_infinity=True,
        )
        return found / sizes.clamp(min=1).to(found.device)

    def _distance(
        self, batch: Batch, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
    ) -> Tensor:
        parts = [relative_error(student[name], teacher[name]) for name in self.inner]
        for head in self.heads:
            s, t = student[head.tensor], teacher[head.tensor]
            if head.axis is None:
                parts.append(relative_error(s, t))
            else:
                s, t = s.movedim(head.axis, -1), t.movedim(head.axis, -1)
                valid = self._valid(head, batch, student)
                parts += [divergence(s, t, valid), relative_error(s, t, valid)]
        return torch.stack(parts).sum(0)

    def _valid(self, head: Head, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor | None:
        """Which frames of logits [batch, frames, classes] are no padding; None for all."""
        x = outputs[head.tensor]
        if x.ndim != 3 or head.axis not in {-1, 2} or len(batch.frames) != len(x):
            return None
        frames = self._frames(batch, outputs, x.shape[1])
        return (torch.arange(x.shape[1]) < frames[:, None]).to(x.device)

    def _frames(self, batch: Batch, outputs: Mapping[str, Tensor], size: int) -> Tensor:
        """Valid frames of the result, int64 [batch], on the CPU."""
        if self.lengths is not None:
            return outputs[self.lengths].cpu().long()
        longest = max(values.shape[-1] for values in batch.feed.values() if values.ndim > 1)
        stride = max(1, round(longest / size))
        return (-(-batch.frames // stride)).clamp(max=size)


def lengths_output(graph: gs.Graph) -> str | None:
    """The output that holds one whole number per utterance, if there is one."""
    found = [t.name for t in graph.outputs if t.dtype != np.float32 and len(t.shape or ()) == 1]
    return found[0] if found else None


def divergence(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """Kullback-Leibler divergence of the teacher's distributions from the student's, in nats.

    Args:
        student: Logits [rows, ..., classes].
        teacher: The same.
        valid: Which distributions count, bool [rows, ...]; None for all.

    Returns:
        The mean over each row's distributions, [rows].
    """
    p, q = F.log_softmax(teacher, -1), F.log_softmax(student, -1)
    found = (p.exp() * (p - q)).sum(-1)
    if valid is None:
        return found.reshape(len(found), -1).mean(1)
    counted = (found * valid).reshape(len(found), -1).sum(1)
    return counted / valid.reshape(len(found), -1).sum(1).clamp(min=1)


def relative_error(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Squared error of each row relative to the teacher's power, [rows].

    Of logits it is added to the divergence, which alone lets a student hedge between classes: its
    divergence falls and its best class is wrong more often.

    Args:
        student: [rows, ...].
        teacher: The same.
        valid: What counts of it, bool [rows, ...], for logits [rows, ..., classes]; None for all.
    """
    counted = 1 if valid is None else valid[..., None]
    s, t = ((x * counted).reshape(len(x), -1) for x in (student, teacher))
    return (s - t).square().mean(1) / t.square().mean(1).clamp(min=1e-12)


def sampled(logits: Tensor, valid: Tensor | None, generator: torch.Generator) -> Tensor:
    """The probe of `divergence`: the log-probability of classes drawn from the distributions.

    The Fisher information is both the covariance of its derivative and the curvature of the
    Kullback-Leibler divergence, whose factor is one half.

    Args:
        logits: [rows, ..., classes].
        valid: Which distributions count, bool [rows, ...]; None for all.
        generator: Draws the classes.
    """
    log_probs = F.log_softmax(logits, -1)
    flat = log_probs.detach().reshape(-1, logits.shape[-1]).exp()
    drawn = torch.multinomial(flat.cpu(), 1, generator=generator).to(logits.device)
    found = log_probs.gather(-1, drawn.reshape(*logits.shape[:-1], 1)).squeeze(-1)
    counted = torch.ones_like(found) if valid is None else valid.to(found.dtype)
    size = counted.reshape(len(found), -1).sum(1).clamp(min=1) * 2 * len(found)
    return ((found * counted).reshape(len(found), -1).sum(1) / size.sqrt()).sum()


def signed(x: Tensor, generator: torch.Generator) -> Tensor:
    """The probe of `relative_error`: the sum under random signs, relative to each row's power."""
    rows = x.reshape(len(x), -1)
    signs = torch.randint(0, 2, rows.shape, generator=generator).to(rows) * 2 - 1
    power = rows.detach().square().sum(1).clamp(min=1e-12) * len(rows)
    return ((rows * signs).sum(1) / power.sqrt()).sum()


def require_ctc(graph: gs.Graph, found: Sequence[Head], labels: Sequence[str]) -> None:
    """Refuse models that cannot be trained on transcripts by CTC.

    Raises:
        IntqError: There is not exactly one output [batch, frames, labels and blank].
    """
    shapes = [t.shape for t in graph.outputs if t.dtype == np.float32]
    classes = shapes[0][-1] if len(shapes) == 1 and shapes[0] else None
    last = len(found) == 1 and found[0].axis in {-1, 2} and len(shapes[0] or ()) == 3
    if not last or (isinstance(classes, int) and classes != len(labels) + 1):
        raise IntqError(
            f"model gives {', '.join(f'{t.name} {t.shape}' for t in graph.outputs)}; expected one "
            f"float output [batch, frames, {len(labels) + 1}] behind LogSoftmax, for CTC; "
            "check the labels, or train on feeds, --data"
        )
