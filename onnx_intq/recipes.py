"""The pass pipelines behind `quantize`, as text and as passes; the only place that names passes."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_intq.registry import parse
from onnx_intq.transform import IntqError, Pass

TARGETS = ("ort", "tensorrt", "integer")
PREPARE = "fold_constants, drop_identity, fold_bn"
"""The exact passes before calibration; tensors keep their names from here on."""

CLEAN = "fold_constants, drop_identity"
"""What a model that is quantized already is prepared by."""
COMPLETE = "complete_qdq({cpu})"
"""Every float result on a grid: before the weights, whose scales depend on the grids."""
FUSE = "fuse_layer_norm, fuse_nonlinear"
"""Composite operators become one node each, before grids would part them."""
FUSE_ISLANDS = "fuse_nonlinear"
"""The same for what is an island of integers between Q/DQ pairs."""
LOWER = (
    "integerize_attention({mode}, {cpu})",
    "integerize_conv",
    "integerize_conv_transpose",
    "integerize_matmul({cpu})",
    "integerize_nonlinear({mode})",
    "integerize_softmax({mode})",
    "integerize_layer_norm({mode})",
    "integerize_add",
    "integerize_mul",
    "integerize_div",
    "integerize_mean",
    "integerize_activation",
    "integerize_cast",
    "integerize_move",
)
"""The operators' families, in any order but that composites come before their parts."""
FLOAT = "float"
"""In place of a mode: nonlinear functions are left to TensorRT."""


def pipeline(
    target: str,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    weight_scale: str = "mse",
    keep: Sequence[str] = (),
    wide: Sequence[str] = (),
    overrides: Sequence[tuple[str, int]] = (),
    nonlinear: str = "poly",
    io: str = "float",
    cpu: str = "any",
    quantized: bool = False,
) -> list[Pass]:
    """The passes that turn a float model into one for `target`, preparation included.

    Args:
        target: "ort", "tensorrt" or "integer".
        weight_bits: 2..8.
        activation_bits: 8 or 16.
        weight_scale: "mse" or "minmax".
        keep: Glob patterns of nodes that stay float; none for target "integer".
        wide: Glob patterns of nodes whose inputs get 16 bits; target "ort" only.
        overrides: (glob pattern, weight bits) pairs; the last that matches a node wins.
        nonlinear: "poly", "paper" or "lut"; for target "tensorrt" also "float". Not for "ort".
        io: "float" or "int8"; target "integer" only.
        cpu: "any" or "vnni"; target "integer" only.
        quantized: The model has Q/DQ nodes already; target "integer" only.

    Raises:
        IntqError: Unknown target; or for target integer, 16-bit inputs of products, float nodes or
            float nonlinear functions.
    """
    if target not in TARGETS:
        raise IntqError(f"unknown target {target!r}; expected one of: {', '.join(TARGETS)}")
    if target == "integer":
        _refuse_float(keep, nonlinear, wide=activation_bits != 8 or bool(wide))
    weights = f"bits={weight_bits}, scale={weight_scale!r}, overrides={tuple(overrides)!r}"
    weights = f"quantize_weights({weights})"
    scheme = "ort" if target == "integer" else target
    activations = f"target={scheme!r}, bits={activation_bits}, keep={tuple(keep)!r}"
    activations = f"insert_qdq({activations}, wide={tuple(wide)!r})"
    if target == "ort" or (target == "tensorrt" and nonlinear == FLOAT):
        return parse(f"{PREPARE}, {activations}, {weights}")
    if target == "tensorrt":
        islands = f"{activations}, insert_islands(keep={tuple(keep)!r}), {weights}"
        lowering = f"integerize_nonlinear(mode={nonlinear!r}, target={target!r})"
        return parse(f"{PREPARE}, {FUSE_ISLANDS}, {islands}, {lowering}")
    start = f"{CLEAN}, {FUSE}" if quantized else f"{PREPARE}, {FUSE}, {activations}"
    lowering = ", ".join((COMPLETE, weights, *LOWER))
    names = lowering.format(mode=f"mode={nonlinear!r}", cpu=f"cpu={cpu!r}")
    return parse(f"{start}, {names}, integerize_boundary(io={io!r})")


def _refuse_float(keep: Sequence[str], nonlinear: str, *, wide: bool) -> None:
    """Refuse what target integer cannot have."""
    if wide:
        raise IntqError(
            "16-bit inputs of products for target integer; expected 8 bits, which is what "
            "ConvInteger and MatMulInteger take; leave out -a 16 and a16"
        )
    if keep:
        raise IntqError(
            f"nodes {', '.join(keep)} kept float for target integer; expected none, "
            "for all of them become integers; leave out --override NODES=float"
        )
    if nonlinear == FLOAT:
        raise IntqError(
            "nonlinear functions left in float for target integer; expected poly, paper or lut, "
            "for all of them become integers; leave out --nonlinear float"
        )
