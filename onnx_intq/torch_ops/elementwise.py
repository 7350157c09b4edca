"""Operators that map each element: arithmetic, comparisons, activations, casts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnx_intq.torch_ops.dtypes import torch_dtype

Number = Tensor | float | None


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`function` with the broadcasting of opsets below 7: `b` lies from `axis` of `a` on."""

    def run(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:  # noqa: ARG001
        if axis is not None:
            b = b.reshape(b.shape + (1,) * (a.ndim - axis % max(a.ndim, 1) - b.ndim))
        return function(a, b)

    return run


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(*tensors: Tensor) -> Tensor:
        return functools.reduce(function, tensors)

    return run


def _mean(*tensors: Tensor) -> Tensor:
    return functools.reduce(torch.add, tensors) / len(tensors)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


def _mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _shift(a: Tensor, b: Tensor, *, direction: Literal["LEFT", "RIGHT"]) -> Tensor:
    shifted = a.long() << b.long() if direction == "LEFT" else a.long() >> b.long()
    return shifted.to(a.dtype)


def _clip(x: Tensor, min_: Number = None, max_: Number = None) -> Tensor:
    # torch.clamp, not maximum: at the bound its gradient is 1, not 1/2.
    low, high = (
        None if v is None else torch.as_tensor(v, dtype=x.dtype, device=x.device)
        for v in (min_, max_)
    )
    return x if low is None and high is None else torch.clamp(x, low, high)


def _cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:  # noqa: ARG001
    return x.to(torch_dtype(to))


def _cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:  # noqa: ARG001
    return x.to(like.dtype)


def _is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    return (torch.isposinf(x) & bool(detect_positive)) | (torch.isneginf(x) & bool(detect_negative))


def _prelu(x: Tensor, slope: Tensor, *, opset: int) -> Tensor:
    if opset < 7 and slope.numel() > 1:  # one slope per channel
        slope = slope.reshape(-1, *(1,) * (x.ndim - 2))
    return torch.where(x < 0, x * slope, x)


def _leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def _elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def _selu(x: Tensor, *, alpha: float = 1.6732632, gamma: float = 1.0507010) -> Tensor:
    return gamma * F.elu(x, alpha)


def _celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


def _thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.threshold(x, alpha, 0.0)


def _hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def _gelu(x: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def _swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def _shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    kept = torch.where(x > lambd, x - bias, torch.zeros_like(x))
    return torch.where(x < -lambd, x + bias, kept)


def _identity(x: Tensor) -> Tensor:
    return x


def _dropout(
    x: Tensor,
    ratio: float = 0.5,
    training_mode: bool = False,
    *,
    is_test: int = 1,  # noqa: ARG001
    seed: int = 0,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    if training_mode and ratio > 0:
        raise ValueError("Dropout in training mode; expected an inference graph")
    return x, torch.ones_like(x, dtype=torch.bool)


OPS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitShift": _shift,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": torch.ceil,
    "Celu": _celu,
    "Clip": _clip,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Div": _binary(_divide),
    "Dropout": _dropout,
    "Elu": _elu,
    "Equal": _binary(torch.eq),
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Gelu": _gelu,
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": torch.ge,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": F.hardswish,
    "Identity": _identity,
    "IsInf": _is_inf,
    "IsNaN": torch.isnan,
    "LeakyRelu": _leaky_relu,
    "Less": _binary(torch.lt),
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "Max": _variadic(torch.maximum),
    "Mean": _mean,
    "Min": _variadic(torch.minimum),
    "Mish": F.mish,
    "Mod": _mod,
    "Mul": _binary(torch.mul),
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": _binary(torch.logical_or),
    "PRelu": _prelu,
    "Pow": _binary(_power),
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Sub": _binary(torch.sub),
    "Sum": _variadic(torch.add),
    "Swish": _swish,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "ThresholdedRelu": _thresholded_relu,
    "Where": torch.where,
    "Xor": _binary(torch.logical_xor),
}
