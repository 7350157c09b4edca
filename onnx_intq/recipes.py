"""The pass pipelines behind `quantize`, as text and as passes; the only place that names passes."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_intq.registry import parse
from onnx_intq.transform import IntqError, Pass

TARGETS = ("ort", "tensorrt")
PREPARE = "fold_constants, drop_identity, fold_bn"
"""The exact passes before calibration; tensors keep their names from here on."""


def pipeline(
    target: str,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    weight_scale: str = "mse",
    keep: Sequence[str] = (),
    wide: Sequence[str] = (),
    overrides: Sequence[tuple[str, int]] = (),
) -> list[Pass]:
    """The passes that turn a float model into one for `target`, preparation included.

    Args:
        target: "ort" or "tensorrt".
        weight_bits: 2..8.
        activation_bits: 8 or 16.
        weight_scale: "mse" or "minmax".
        keep: Glob patterns of nodes that stay float.
        wide: Glob patterns of nodes whose inputs get 16 bits; target "ort" only.
        overrides: (glob pattern, weight bits) pairs; the last that matches a node wins.

    Raises:
        IntqError: Unknown target.
    """
    if target not in TARGETS:
        raise IntqError(f"unknown target {target!r}; expected one of: {', '.join(TARGETS)}")
    weights = f"bits={weight_bits}, scale={weight_scale!r}, overrides={tuple(overrides)!r}"
    activations = f"target={target!r}, bits={activation_bits}, keep={tuple(keep)!r}"
    return parse(
        f"{PREPARE}, insert_qdq({activations}, wide={tuple(wide)!r}), quantize_weights({weights})"
    )
