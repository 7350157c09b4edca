"""The RNN-T loss: minus the logarithm of the summed probability of all alignments.

Source: Graves, "Sequence Transduction with Recurrent Neural Networks", arXiv:1211.3711, sections
2.4 and 2.5. The lattice's cells (frame t, label u) with t + u = d depend on those of d - 1 alone,
so that each anti-diagonal is computed at once. Where -inf stands there is no way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onnx_intq.transform import IntqError


def transducer_loss(
    logits: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor, blank: int
) -> Tensor:
    """The loss of each string, in nats; differentiable once in `logits`.

    Law: what lies beyond a string's frames and labels has no influence and gets no gradient.

    Args:
        logits: Scores of each class at frame t after u labels, before the softmax, float
            [N, T, U + 1, V], finite.
        labels: int64 [N, U], from 0 to V - 1; anything beyond the strings' lengths.
        frames: Of each string, int64 [N], from 1 to T.
        lengths: Labels of each string, int64 [N], from 0 to U.
        blank: Which class is the blank.

    Returns:
        Float [N].

    Raises:
        IntqError: The shapes do not fit each other, or a length is out of range.
    """
    _check(logits, labels, frames, lengths)
    log_probs = logits.log_softmax(dim=-1)
    valid = torch.arange(labels.shape[1], device=labels.device) < lengths.unsqueeze(1)
    chosen = torch.where(valid, labels, 0)[:, None, :, None].expand(-1, logits.shape[1], -1, 1)
    written = log_probs[:, :, :-1].gather(3, chosen).squeeze(3)
    written = _padded(written, (0, 1))  # after the last label there is none
    losses: Tensor = _Lattice.apply(  # type: ignore[no-untyped-call]
        log_probs[..., blank], written, frames, lengths
    )
    return losses


class _Lattice(torch.autograd.Function):
    """The loss from log-probabilities of the blank and of the next label, [N, T, U + 1] each."""

    @staticmethod
    def forward(
        ctx: Any, blank: Tensor, written: Tensor, frames: Tensor, lengths: Tensor
    ) -> Tensor:
        down = _skewed(blank, frames, lengths)
        right = _skewed(written, frames, lengths - 1)
        alpha = _alphas(down, right)
        strings = torch.arange(len(frames), device=frames.device)
        total = (alpha + down)[frames - 1 + lengths, strings, lengths]
        ctx.save_for_backward(alpha, down, right, frames, lengths, total)
        return -total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Minus the share of all alignments that goes each way (section 2.5)."""
        alpha, down, right, frames, lengths, total = ctx.saved_tensors
        behind_blank, behind_label = _betas(down, right, frames, lengths)
        known = alpha - total[:, None]
        scale = -gradient[:, None]
        blank = (known + down + behind_blank).exp() * scale
        written = (known + right + behind_label).exp() * scale
        return _straight(blank), _straight(written), None, None


def _alphas(down: Tensor, right: Tensor) -> Tensor:
    """Log-probability of all ways to each cell, [diagonals, N, U + 1] (equation 16)."""
    first = torch.full_like(down[0], -torch.inf)
    first[:, 0] = 0
    found = [first]
    for blank, written in zip(down[:-1], right[:-1], strict=True):
        before = found[-1]
        found.append(torch.logaddexp(before + blank, _moved(before + written, 1)))
    return torch.stack(found)


def _betas(down: Tensor, right: Tensor, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of all that may follow the blank, and the label, of each cell."""
    labels = torch.arange(down.shape[2], device=down.device)
    last = labels == lengths[:, None]
    beta = torch.full_like(down[0], -torch.inf)
    behind_blank, behind_label = [], []
    for d in range(len(down) - 1, -1, -1):
        ended = last & (frames - 1 + lengths == d)[:, None]
        behind_blank.append(torch.where(ended, 0.0, beta))
        behind_label.append(_moved(beta, -1))
        beta = torch.logaddexp(down[d] + behind_blank[-1], right[d] + behind_label[-1])
    return torch.stack(behind_blank[::-1]), torch.stack(behind_label[::-1])


def _moved(cells: Tensor, by: int) -> Tensor:
    """[N, U + 1] shifted by one label, forwards or back."""
    if by == 1:
        return _padded(cells[:, :-1], (1, 0))
    return _padded(cells[:, 1:], (0, 1))


def _padded(cells: Tensor, widths: tuple[int, int]) -> Tensor:
    """Add cells to which there is no way along the last axis."""
    return torch.nn.functional.pad(cells, widths, value=-torch.inf)


def _skewed(cells: Tensor, frames: Tensor, longest: Tensor) -> Tensor:
    """Rows of anti-diagonals, [T + U, N, U + 1]; -inf beyond each string's frames and labels."""
    _, time, width = cells.shape
    label = torch.arange(width, device=cells.device)
    frame = torch.arange(time + width - 1, device=cells.device)[:, None] - label
    inside = (frame >= 0) & (frame < frames[:, None, None]) & (label <= longest[:, None, None])
    index = frame.clamp(0, time - 1).expand(len(cells), -1, -1)
    return torch.where(inside, cells.gather(1, index), -torch.inf).transpose(0, 1)


def _straight(diagonals: Tensor) -> Tensor:
    """[T + U, N, U + 1] back to [N, T, U + 1]."""
    count, _, width = diagonals.shape
    time = count - width + 1
    label = torch.arange(width, device=diagonals.device)
    index = torch.arange(time, device=diagonals.device)[:, None] + label
    rows = diagonals.transpose(0, 1)
    return rows.gather(1, index.expand(len(rows), -1, -1))


def _check(logits: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor) -> None:
    count, time, width, _ = logits.shape
    if labels.shape != (count, width - 1) or not frames.shape == lengths.shape == (count,):
        shapes = ", ".join(str(list(each.shape)) for each in (logits, labels, frames, lengths))
        raise IntqError(f"shapes are {shapes}; expected [N, T, U + 1, V], [N, U], [N] and [N]")
    outside = (frames < 1) | (frames > time) | (lengths < 0) | (lengths >= width)
    if outside.any():
        raise IntqError(
            f"frames {frames.tolist()} and lengths {lengths.tolist()}; expected 1 to {time} frames "
            f"and 0 to {width - 1} labels"
        )
