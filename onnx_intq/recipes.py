"""The pass pipelines behind `quantize`, as text and as passes; the only place that names passes."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_intq.registry import parse
from onnx_intq.transform import IntqError, Pass

TARGETS = ("ort", "tensorrt", "integer")
PREPARE = "fold_constants, fuse_lengths, drop_identity, fold_bn, fold_scale"
"""The exact passes before calibration; tensors keep their names from here on."""

CLEAN = "fold_constants, fuse_lengths, drop_identity"
"""What a model that is quantized already is prepared by."""
STORE = "quantize_tables"
"""What `complete_qdq` does for target integer, among others."""
COMPLETE = "complete_qdq({cpu})"
"""Every float result on a grid: before the weights, whose scales depend on the grids."""
FUSE = "fuse_layer_norm, fuse_nonlinear, move_mask, fold_bias"
"""Composite operators become one node each, before grids would part them."""
FUSE_ISLANDS = "fuse_nonlinear"
"""The same for what is an island of integers between Q/DQ pairs."""
LOWER = (
    "integerize_attention({mode}, {cpu})",
    "integerize_conv({cpu})",
    "integerize_conv_transpose",
    "integerize_matmul({cpu})",
    "integerize_lstm({mode}, {cpu})",
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
BOOSTERS = ("equalize", "choose_grids", "round_weights", "correct_bias")
"""Passes that raise accuracy by data, in their order."""
BOOST = ("round_weights", "correct_bias")
"""Those that lowered word errors; `choose_grids` raises SQNR, and not yet words."""
SHIFT = 0.2
"""Octaves that channels may reach beyond the data where real data is equalized on."""
FEW_BITS = 5
"""From here down, rounding weights also makes up for what earlier layers have changed."""
FLOAT = "float"
"""In place of a mode: nonlinear functions are left to TensorRT."""
TABLES = "lut"
"""The mode whose functions are tables, for arguments of 8 bits."""


def pipeline(
    target: str,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    mixed: bool = False,
    weight_scale: str = "mse",
    keep: Sequence[str] = (),
    wide: Sequence[str] = (),
    overrides: Sequence[tuple[str, int]] = (),
    nonlinear: str = "poly",
    io: str = "float",
    cpu: str = "any",
    quantized: bool = False,
    boost: Sequence[str] = (),
    scores: Sequence[str] = (),
) -> list[Pass]:
    """The passes that turn a float model into one for `target`, preparation included.

    Args:
        target: "ort", "tensorrt" or "integer".
        weight_bits: 2..8.
        activation_bits: 8 or 16.
        mixed: Measure which tensors need more than `activation_bits`.
        weight_scale: "mse" or "minmax".
        keep: Glob patterns of nodes that stay float; none for target "integer".
        wide: Glob patterns of nodes whose inputs get 16 bits; not for target "tensorrt".
        overrides: (glob pattern, weight bits) pairs; the last that matches a node wins.
        nonlinear: "poly", "paper" or "lut"; for target "tensorrt" also "float". Not for "ort".
        io: "float" or "int8"; target "integer" only.
        cpu: "any" or "vnni"; target "integer" only.
        quantized: The model has Q/DQ nodes already; target "integer" only. Without boosters.
        boost: Of `BOOSTERS`, in any order: for all of them feeds are needed, ranges are not enough.
        scores: Results that are compared with each other: see `placement.plan`.

    Raises:
        IntqError: Unknown target or booster; or for target integer, float nodes or float nonlinear
            functions.
    """
    _refuse_unknown(target, boost)
    if target == "integer":
        _refuse_float(keep, nonlinear)
    boost = () if quantized else boost
    options = f"bits={weight_bits}, scale={weight_scale!r}, overrides={tuple(overrides)!r}"
    compensate = weight_bits <= FEW_BITS
    weights = _joined(
        "" if target == "integer" else STORE,
        f"quantize_weights({options}, recurrent={target == 'tensorrt'})",
        f"round_weights(compensate={compensate})" if "round_weights" in boost else "",
        "correct_bias" if "correct_bias" in boost else "",
    )
    scheme, kept = f"target={target!r}", f"keep={tuple(keep)!r}"
    tables = f"tables={target == 'integer' and nonlinear == TABLES}"
    limit = "" if mixed else ", limit=0.0"
    chosen = f"choose_grids({scheme}, {kept}, {tables}{limit})"
    activations = _joined(
        f"equalize({scheme}, bits={weight_bits}, shift={SHIFT})" if "equalize" in boost else "",
        chosen if mixed or "choose_grids" in boost else "",
        f"insert_qdq({scheme}, bits={activation_bits}, {kept}, wide={tuple(wide)!r}, {tables}, "
        f"scores={tuple(scores)!r})",
    )
    if target == "ort" or (target == "tensorrt" and nonlinear == FLOAT):
        return parse(f"{PREPARE}, {activations}, {weights}")
    if target == "tensorrt":
        islands = f"{activations}, insert_islands({kept}), {weights}"
        lowering = f"integerize_nonlinear(mode={nonlinear!r}, target={target!r})"
        return parse(f"{PREPARE}, {FUSE_ISLANDS}, {islands}, {lowering}")
    start = f"{CLEAN}, {FUSE}" if quantized else f"{PREPARE}, {FUSE}, {activations}"
    modes = {"mode": f"mode={nonlinear!r}", "cpu": f"cpu={cpu!r}"}
    lowering = ", ".join(LOWER).format(**modes)  # patterns of names may hold braces
    completion = f"{COMPLETE.format(**modes)}, {weights}"
    return parse(f"{start}, {completion}, {lowering}, integerize_boundary(io={io!r})")


def compression(
    bits: int | None = None,
    *,
    kind: str = "lloyd",
    keep: Sequence[str] = (),
    overrides: Sequence[tuple[str, int]] = (),
    boost: bool = False,
) -> str:
    """The passes that `compress` runs, as text; for a float model, behind `PREPARE`.

    Args:
        bits: Of the weights; None where they are integers already.
        kind: Of codebook.
        keep: Glob patterns of nodes whose weights stay float.
        overrides: (glob pattern, bits) pairs; the last that matches a node wins.
        boost: Choose roundings and biases by data.
    """
    options = f"bits={bits}, kind={kind!r}, keep={tuple(keep)!r}, overrides={tuple(overrides)!r}"
    return _joined(
        "" if bits is None else f"quantize_codebook({options})",
        f"round_weights(compensate={bits is not None and bits <= FEW_BITS})" if boost else "",
        "correct_bias" if boost else "",
        "pack_weights",
    )


def _joined(*passes: str) -> str:
    return ", ".join(filter(None, passes))


def _refuse_unknown(target: str, boost: Sequence[str]) -> None:
    if target not in TARGETS:
        raise IntqError(f"unknown target {target!r}; expected one of: {', '.join(TARGETS)}")
    if unknown := sorted(set(boost) - set(BOOSTERS)):
        raise IntqError(f"unknown booster {unknown[0]!r}; expected some of: {', '.join(BOOSTERS)}")


def _refuse_float(keep: Sequence[str], nonlinear: str) -> None:
    """Refuse what target integer cannot have."""
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
