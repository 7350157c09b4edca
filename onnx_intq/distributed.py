"""Several processes that train one model, each on its share of every batch.

Law: the sum of the gradients of all shares is the gradient of the whole batch, so the result is
that of one process but for the rounding of sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class Group:
    """The processes of a training.

    Attributes:
        rank: Number of this one, 0 for the one that writes.
        ranks: How many there are.
    """

    rank: int = 0
    ranks: int = 1

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `ranks`-th item, from number `rank` on."""
        return items[self.rank :: self.ranks]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place and in one message."""
        if self.ranks == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether the flag of any process is set."""
        found = torch.tensor([float(flag)])
        self.sum([found])
        return bool(found.item())


@contextmanager
def group() -> Iterator[Group]:
    """The processes that `torchrun` has started, or this one alone."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield Group()
        return
    dist.init_process_group("gloo")
    try:
        yield Group(rank=dist.get_rank(), ranks=ranks)
    finally:
        dist.destroy_process_group()
