"""What the training of an RNN-T makes small: its own loss, and distance from the float model.

The predictor's graph is one step; it is unrolled over the labels of each transcript.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from onnx_intq.training_data import Batch
from onnx_intq.training_loss import divergence, sampled
from onnx_intq.training_network import TrainedNetwork, Values
from onnx_intq.transducer_loss import transducer_loss
from onnx_intq.transform import IntqError

STATES = ("h", "c")
"""Inputs of encoder and predictor; their outputs have `_out` behind the name."""


@dataclass(frozen=True, kw_only=True)
class TransducerObjective:
    """The transducer loss and distillation on its lattice, for the folder's three graphs.

    Attributes:
        network: Runs teacher and student.
        task: Factor of the transducer loss.
        distill: Factor of the mean divergence over the lattice.
    """

    network: TrainedNetwork
    task: float
    distill: float

    def losses(self, batch: Batch, values: Values) -> Tensor:
        """See `training_loss.Objective`."""
        lengths = torch.tensor([len(each) for each in batch.targets])
        student = self.lattice(batch, values)
        frames = _frames(batch, student.shape[1])
        parts = []
        if self.task:
            targets = pad_sequence([*batch.targets], batch_first=True).to(student.device)
            sizes = (frames.to(student.device), lengths.to(student.device))
            found = transducer_loss(student, targets, *sizes, student.shape[3] - 1)
            parts.append(self.task * found / lengths.clamp(min=1).to(student.device))
        if self.distill:
            with torch.no_grad():
                teacher = self.lattice(batch, {})
            valid = _valid(frames, lengths, student)
            parts.append(self.distill * divergence(student, teacher, valid))
        return torch.stack(parts).sum(0)

    def probe(self, batch: Batch, values: Values, generator: torch.Generator) -> Tensor:
        """See `training_loss.Objective`."""
        found = self.lattice(batch, values)
        lengths = torch.tensor([len(each) for each in batch.targets])
        valid = _valid(_frames(batch, found.shape[1]), lengths, found)
        return sampled(found, valid, generator)

    def lattice(self, batch: Batch, values: Values) -> Tensor:
        """Scores at each frame after each label, [batch, frames, labels + 1, classes]."""
        run, parts = self.network.run, self.network.parts
        device, rows = self.network.device, len(batch.frames)
        feed = {**batch.feed, **_start(parts["encoder"], rows, device)}
        encoded = run("encoder", feed, values)["encoded"]
        targets = pad_sequence([*batch.targets], batch_first=True).to(device)
        state, outputs = _start(parts["predictor"], rows, device), []
        first = torch.full((rows, 1), _blank(parts["joint"]), device=device)
        for label in torch.split(torch.cat([first, targets], 1), 1, 1):
            found = run("predictor", {"label": label, **state}, values)
            outputs.append(found["predicted"])
            state = {name: found[f"{name}_out"] for name in STATES}
        joint = {"encoded": encoded, "predicted": torch.cat(outputs, 1)}
        return run("joint", joint, values)["logits"]


def require_transducer(parts: dict[str, gs.Graph], labels: int) -> None:
    """Refuse an RNN-T whose joint does not know the labels.

    Raises:
        IntqError: The classes are not the labels and the blank.
    """
    if _blank(parts["joint"]) != labels:
        raise IntqError(
            f"joint.onnx gives {_blank(parts['joint']) + 1} classes; expected {labels} labels and "
            "the blank; check the labels"
        )


def _blank(joint: gs.Graph) -> int:
    return int(joint.outputs[0].shape[-1]) - 1


def _start(graph: gs.Graph, rows: int, device: str) -> dict[str, Tensor]:
    """Zero states [layers, rows, width]."""
    shapes = {t.name: t.shape for t in graph.inputs if t.name in STATES}
    return {n: torch.zeros(s[0], rows, s[2], device=device) for n, s in shapes.items()}


def _frames(batch: Batch, size: int) -> Tensor:
    """Valid frames of the encoder's result, int64 [batch]."""
    longest = max(values.shape[-1] for values in batch.feed.values())
    stride = max(1, round(longest / size))
    return (-(-batch.frames // stride)).clamp(max=size)


def _valid(frames: Tensor, lengths: Tensor, lattice: Tensor) -> Tensor:
    """Which cells of a lattice are inside, bool [batch, frames, labels + 1]."""
    times, labels = (torch.arange(size) for size in lattice.shape[1:3])
    inside = (times < frames[:, None])[:, :, None] & (labels <= lengths[:, None])[:, None]
    return inside.to(lattice.device)
