"""The nearest of a few levels, with a gradient: the straight-through estimate.

Source: Bengio et al., "Estimating or propagating gradients through stochastic neurons",
arXiv:1308.3432.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST = 127
"""Levels and weights are held in int8, -128 left out: a symmetric grid."""
FINE = 16
"""Places looked at per step of int8: levels near zero lie only a few steps apart."""


def nearest(latent: Tensor, levels: Tensor) -> Tensor:
    """Each value's level; its gradient goes to that level and, inside the levels, to the value.

    Args:
        latent: Any shape; rounded to 1/16 first, which makes of the search a table.
        levels: Whole numbers in float32 [K], ascending, within -127..127.
    """
    result: Tensor = _Nearest.apply(latent, levels)  # type: ignore[no-untyped-call]
    return result


def _places(latent: Tensor) -> Tensor:
    clamped = latent.detach().clamp(-LARGEST, LARGEST)
    return clamped.mul_(FINE).round_().add_(LARGEST * FINE).to(torch.int32)


def _table(levels: Tensor) -> Tensor:
    """Index of the level nearest to each place, [4065]; of two, the upper one."""
    every = torch.arange(-LARGEST * FINE, LARGEST * FINE + 1, device=levels.device) / FINE
    bounds = (levels.detach()[1:] + levels.detach()[:-1]) / 2
    return torch.bucketize(every, bounds, right=True).to(torch.uint8)


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, levels: Tensor) -> Tensor:
        places, table = _places(latent), _table(levels).int()
        ctx.save_for_backward(latent, levels, places, table)
        return levels[table].index_select(0, places.reshape(-1)).reshape(latent.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (latent, levels, places, table) = grads, ctx.saved_tensors
        each = levels.new_zeros(len(table)).index_add_(0, places.reshape(-1), grad.reshape(-1))
        sums = torch.zeros_like(levels).index_add_(0, table, each)
        return grad * ((latent >= levels[0]) & (latent <= levels[-1])), sums
