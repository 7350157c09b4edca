"""Folds BatchNormalization into the linear operator before it, or after it where that is exact.

Before: `y = BatchNormalization(Conv(x, w, b))`.  After: `y = Conv(x, w*s, (b - mean)*s + beta)`
with s = gamma / sqrt(variance + epsilon) (Q-ASR section 2.1; computed in float64).
Condition: constant weights and statistics; nothing else reads the tensor between the two. Before a
convolution a BatchNormalization folds only without padding: padding inserts zeros after it, and
they would have to be shifted too. One that cannot go stays, is named, and is counted as remaining.
Law: outputs do not change but for float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.graph import (
    Names,
    constant,
    producer,
    remove,
    replace_uses,
    sole_consumer,
    subgraphs,
)
from onnx_intq.transform import Context, Pass

Array = npt.NDArray[Any]
LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@dataclass(frozen=True, kw_only=True)
class FoldBn(Pass):
    """Fold every BatchNormalization that can be folded exactly; name the others."""

    gives: ClassVar[frozenset[str]] = frozenset({"bn-folded"})

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Fold, bodies included; return how many were folded."""
        names = Names(model)
        return sum(_fold_all(sub, names, ctx) for sub in subgraphs(model))


def _fold_all(graph: gs.Graph, names: Names, ctx: Context) -> int:
    norms = [node for node in graph.nodes if node.op == "BatchNormalization"]
    own = {id(node) for node in graph.nodes}
    why = {id(bn): "not tried" for bn in norms}
    # On the way forward one that goes can free the next one, on the way back the one before it.
    for bn in (*norms, *reversed(norms)):
        if why[id(bn)]:
            why[id(bn)] = _fold(graph, bn, own, names)
    for bn in norms:
        if why[id(bn)]:
            ctx.remain(bn, why[id(bn)])
    folded = [bn for bn in norms if not why[id(bn)]]
    remove(graph, folded)
    return len(folded)


def _fold(graph: gs.Graph, bn: gs.Node, own: set[int], names: Names) -> str:
    """Fold one; return what is in the way, "" if nothing is."""
    affine = _affine(bn)
    if affine is None:
        return (
            "its statistics are not constant and finite, or it is in training mode "
            "(if they are computed from constants, run fold_constants first)"
        )
    before, after = producer(bn.inputs[0]), list(bn.outputs[0].outputs)
    into_before = _obstacle_before(graph, bn, before, own)
    into_after = _obstacle_after(graph, bn, after, affine[1]) if into_before else ""
    if into_before and into_after:
        return f"not into the operator before ({into_before}), nor after ({into_after})"
    source, result = bn.inputs[0], bn.outputs[0]
    name = source.name if into_before else result.name
    for node in after if into_before else ():
        _scale_inputs(node, *affine, names)
    if before is not None and not into_before:
        _scale_outputs(before, *affine, names)
    replace_uses(graph, result, source)
    bn.inputs.clear()
    bn.outputs.clear()
    source.name = name
    return ""


def _affine(bn: gs.Node) -> tuple[Array, Array] | None:
    values = [constant(bn, i) for i in range(1, 5)]
    if bn.attrs.get("training_mode", 0) or any(v is None for v in values):
        return None
    gamma, beta, mean, variance = (np.asarray(v, np.float64) for v in values)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + float(np.float32(bn.attrs.get("epsilon", 1e-5))))
        shift = beta - mean * scale
    return (scale, shift) if np.isfinite(scale).all() and np.isfinite(shift).all() else None


def _obstacle_before(graph: gs.Graph, bn: gs.Node, node: gs.Node | None, own: set[int]) -> str:
    if node is None or node.op not in LINEAR or id(node) not in own:
        return "it is no convolution or matrix product"
    if sole_consumer(graph, node.outputs[0]) is not bn:
        return f"{node.name}'s result is read elsewhere too"
    if not _has_constant_weights(node):
        return f"{node.name}'s weights are not constant"
    if node.op == "MatMul" and not all(len(t.shape or ()) == 2 for t in node.inputs):
        return f"{node.name}'s result is not of rank 2, its channels are not axis 1"
    return ""


def _obstacle_after(graph: gs.Graph, bn: gs.Node, nodes: list[gs.Node], shift: Array) -> str:
    if not nodes or any(bn.outputs[0] is t for t in graph.outputs):
        return "it is a graph output"
    for node in nodes:
        if node.op not in {"Conv", "Gemm"} or node.inputs[0] is not bn.outputs[0]:
            return f"{node.name} is no convolution or Gemm"
        if not _has_constant_weights(node):
            return f"{node.name}'s weights are not constant"
        if node.attrs.get("transA", 0):
            return f"{node.name} transposes its input"
        if node.op == "Conv" and _pads(node) and shift.any():
            return f"{node.name} pads with zeros after the BatchNormalization"
    return ""


def _pads(node: gs.Node) -> bool:
    auto = node.attrs.get("auto_pad", "NOTSET")
    return any(node.attrs.get("pads", [])) if auto == "NOTSET" else auto != "VALID"


def _has_constant_weights(node: gs.Node) -> bool:
    return all(isinstance(t, gs.Constant) or t.is_empty() for t in node.inputs[1:])


def _bias(node: gs.Node) -> Array:
    bias = constant(node, 2)
    return np.zeros(()) if bias is None else bias.astype(np.float64)


def _scale_outputs(node: gs.Node, scale: Array, shift: Array, names: Names) -> None:
    w = np.asarray(node.inputs[1].values, np.float64)
    if node.op == "MatMul":
        node.op, node.attrs = "Gemm", {}
    if node.op == "Conv":
        w = w * scale.reshape(-1, *[1] * (w.ndim - 1))
    elif node.op == "ConvTranspose":
        group = node.attrs.get("group", 1)
        per_group = scale.reshape(group, 1, -1, *[1] * (w.ndim - 2))
        w = (w.reshape(group, -1, *w.shape[1:]) * per_group).reshape(w.shape)
    else:
        w = w * (scale[:, None] if node.attrs.get("transB", 0) else scale)
        w = w * node.attrs.pop("alpha", 1.0)
    bias = _bias(node) * node.attrs.pop("beta", 1.0)
    _set_weights(node, w, bias * scale + shift, names)


def _scale_inputs(node: gs.Node, scale: Array, shift: Array, names: Names) -> None:
    w = np.asarray(node.inputs[1].values, np.float64)
    if node.op == "Gemm":
        w = w * node.attrs.pop("alpha", 1.0)
        rows = w if node.attrs.get("transB", 0) else w.T
        added = rows @ shift
        w = w * (scale if node.attrs.get("transB", 0) else scale[:, None])
        _set_weights(node, w, _bias(node) * node.attrs.pop("beta", 1.0) + added, names)
        return
    group = node.attrs.get("group", 1)
    grouped = w.reshape(group, -1, *w.shape[1:])
    ones = [1] * (w.ndim - 2)
    added = (grouped * shift.reshape(group, 1, -1, *ones)).reshape(len(w), -1).sum(axis=1)
    w = (grouped * scale.reshape(group, 1, -1, *ones)).reshape(w.shape)
    _set_weights(node, w, _bias(node) + added, names)


def _set_weights(node: gs.Node, w: Array, bias: Array, names: Names) -> None:
    old = node.inputs[1:]
    wishes = (f"{node.outputs[0].name}_weight", f"{old[0].name}_bias")
    kept = [t.name if len(t.outputs) == 1 else "" for t in old if not t.is_empty()]
    node.inputs = node.inputs[:1]
    for values, wish, name in zip_longest((w, bias), wishes, kept):
        array = np.ascontiguousarray(values, old[0].values.dtype)
        node.inputs.append(gs.Constant(name or names.new(wish), array))
