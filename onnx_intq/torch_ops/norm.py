"""Normalisations, at inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` [C] so that they broadcast along axis 1 of `x`."""
    return values.reshape(-1, *(1,) * (x.ndim - 2))


def _batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,  # noqa: ARG001
    spatial: Literal[1] = 1,  # noqa: ARG001
    is_test: int = 1,  # noqa: ARG001
    training_mode: Literal[0] = 0,  # noqa: ARG001
) -> Tensor:
    # One multiply-add in whatever memory order x has: F.batch_norm on channels-last 1-D activations
    # took 12 times as long on a CPU, forward and backward.
    gain = scale * torch.rsqrt(variance + epsilon)
    offset = bias - mean * gain
    return torch.addcmul(_per_channel(offset, x), x, _per_channel(gain, x))


def _instance_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5
) -> Tensor:
    return _group_normalization(x, scale, bias, num_groups=x.shape[1], epsilon=epsilon)


def _group_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,  # noqa: ARG001
) -> Tensor:
    members = x.shape[1] // scale.shape[0]  # opset 18 has one scale per group
    scale, bias = (v.repeat_interleave(members) for v in (scale, bias))
    groups = x.reshape(x.shape[0], num_groups, -1)
    normal = F.layer_norm(groups, groups.shape[2:], eps=epsilon).reshape(x.shape)
    return torch.addcmul(_per_channel(bias, x), normal, _per_channel(scale, x))


def _layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,  # noqa: ARG001
    outputs: int,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    lengths = x.shape[axis % x.ndim :]
    if scale.shape == lengths and (bias is None or bias.shape == lengths):
        y = F.layer_norm(x, lengths, scale, bias, epsilon)
    else:
        y = F.layer_norm(x, lengths, eps=epsilon) * scale
        y = y if bias is None else y + bias
    if outputs == 1:
        return y
    variance, mean = torch.var_mean(x, tuple(range(-len(lengths), 0)), correction=0, keepdim=True)
    return y, mean, torch.rsqrt(variance + epsilon)


def _rms_normalization(
    x: Tensor,
    scale: Tensor,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,  # noqa: ARG001
) -> Tensor:
    return F.rms_norm(x, x.shape[axis % x.ndim :], eps=epsilon) * scale


def _lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def _mean_variance_normalization(x: Tensor, *, axes: tuple[int, ...] = (0, 2, 3)) -> Tensor:
    deviation, mean = torch.std_mean(x, tuple(axes), correction=0, keepdim=True)
    return (x - mean) / (deviation + 1e-9)


def _lrn(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    sides = ((size - 1) // 2, size - 1 - (size - 1) // 2)
    squares = F.pad(x * x, (0, 0) * (x.ndim - 2) + sides).unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * squares) ** beta


OPS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "BatchNormalization": _batch_normalization,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LRN": _lrn,
    "LayerNormalization": _layer_normalization,
    "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance_normalization,
    "RMSNormalization": _rms_normalization,
}
