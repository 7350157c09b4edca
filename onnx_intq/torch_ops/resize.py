"""Resize and Upsample: nearest, linear and cubic interpolation, one axis after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["nearest", "linear", "cubic"]
Transformation = Literal[
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"
]


def _source(mode: Transformation, out: int, length: int, scale: float) -> Tensor:
    """Where each output element lies on the input axis, by the specification's formulas."""
    x = torch.arange(out, dtype=torch.float64)
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        return x * (length - 1) / (out - 1) if out > 1 else x * 0
    if mode == "pytorch_half_pixel" and out <= 1:
        return x * 0
    if mode == "half_pixel_symmetric":
        centre = length / 2 * (1 - out / (scale * length))
        return centre + (x + 0.5) / scale - 0.5
    return (x + 0.5) / scale - 0.5


_NEAREST: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' kernel; distances are at most 2."""
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _interpolate(x: Tensor, axis: int, at: Tensor, taps: int, a: float, exclude: bool) -> Tensor:
    """Weighted sum over the `taps` (2 linear, 4 cubic) neighbours of each place of `at`."""
    base = torch.floor(at)
    total: Tensor | None = None
    offsets = range(1 - taps // 2, 1 + taps // 2)
    weights = torch.stack(
        [_cubic(at - base - o, a) if taps == 4 else 1 - (at - base - o).abs() for o in offsets]
    )
    places = torch.stack([base + o for o in offsets])
    if exclude:
        weights = weights * ((places >= 0) & (places < x.shape[axis]))
        weights = weights / weights.sum(0)
    for place, weight in zip(places.clamp(0, x.shape[axis] - 1).long(), weights, strict=True):
        shaped = weight.to(x).reshape(-1, *(1,) * (x.ndim - 1 - axis))
        term = x.index_select(axis, place.to(x.device)) * shaped
        total = term if total is None else total + term
    assert total is not None  # noqa: S101 - taps is 2 or 4
    return total


def _lengths(
    shape: Sequence[int],
    axes: list[int],
    sizes: list[int] | None,
    scales: list[float] | None,
    policy: str,
) -> tuple[list[int], list[float]]:
    if scales:
        return [math.floor(shape[a] * s) for a, s in zip(axes, scales, strict=True)], scales
    if not sizes:
        raise ValueError("Resize without scales and sizes; expected one of them")
    found = [n / shape[a] for a, n in zip(axes, sizes, strict=True)]
    if policy == "stretch":
        return sizes, found
    one = min(found) if policy == "not_larger" else max(found)
    return [math.floor(shape[a] * one + 0.5) for a in axes], [one] * len(axes)


def _resize(
    x: Tensor,
    roi: list[float] | None = None,
    scales: list[float] | None = None,
    sizes: list[int] | None = None,
    *,
    mode: Mode = "nearest",
    coordinate_transformation_mode: Transformation = "half_pixel",
    nearest_mode: Literal[
        "round_prefer_floor", "round_prefer_ceil", "floor", "ceil"
    ] = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,  # noqa: ARG001
    keep_aspect_ratio_policy: Literal["stretch", "not_larger", "not_smaller"] = "stretch",
    axes: list[int] | None = None,
    antialias: Literal[0] = 0,  # noqa: ARG001
    opset: int,
) -> Tensor:
    if opset < 11:  # the second input was scales then
        return _upsample(x, roi, mode=mode)
    axes = [a % x.ndim for a in axes] if axes is not None else list(range(x.ndim))
    lengths, factors = _lengths(x.shape, axes, sizes, scales, keep_aspect_ratio_policy)
    for axis, out, scale in zip(axes, lengths, factors, strict=True):
        if out == x.shape[axis] and scale == 1:
            continue
        at = _source(coordinate_transformation_mode, out, x.shape[axis], scale)
        if mode == "nearest":
            nearest = _NEAREST[nearest_mode](at).clamp(0, x.shape[axis] - 1).long()
            x = x.index_select(axis, nearest.to(x.device))
            continue
        taps = 2 if mode == "linear" else 4
        x = _interpolate(x, axis, at, taps, cubic_coeff_a, bool(exclude_outside))
    return x


def _upsample(x: Tensor, scales: list[float] | None, *, mode: Mode = "nearest") -> Tensor:
    return _resize(
        x,
        scales=scales,
        mode=mode,
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
        opset=11,
    )


OPS: dict[str, Callable[..., Tensor]] = {"Resize": _resize, "Upsample": _upsample}
