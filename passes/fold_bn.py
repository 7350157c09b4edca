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
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant, producer, remove, replace_uses, sole_consumer, subgraphs
from onnx_intq.transform import Context, Pass

Array = npt.NDArray[Any]
LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@dataclass(frozen=True, kw_only=True)
class FoldBn(Pass):
    """Fold every BatchNormalization that can be folded exactly; name the others."""

    gives: ClassVar[frozenset[str]] = frozenset({"bn-folded"})

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Fold, bodies included; return how many were folded."""
        count = 0
        for sub in subgraphs(model):
            folded = []
            for node in [n for n in sub.nodes if n.op == "BatchNormalization"]:
                if why := _fold(sub, node):
                    ctx.remain(node, why)
                else:
                    folded.append(node)
            remove(sub, folded)
            count += len(folded)
        return count


def _fold(graph: gs.Graph, bn: gs.Node) -> str:
    affine = _affine(bn)
    if affine is None:
        return "its statistics are not constant, or it is in training mode"
    before = producer(bn.inputs[0])
    into_before = _obstacle_before(graph, bn, before)
    if before is not None and not into_before:
        _scale_outputs(before, *affine)
        name = bn.outputs[0].name
        replace_uses(graph, bn.outputs[0], before.outputs[0])
        before.outputs[0].name, bn.outputs[0].name = name, f"{name}_unfolded"
        return ""
    after = list(bn.outputs[0].outputs)
    into_after = _obstacle_after(graph, bn, after, affine[1])
    if into_after:
        return f"not into the operator before ({into_before}), nor after ({into_after})"
    for node in after:
        _scale_inputs(node, *affine)
    replace_uses(graph, bn.outputs[0], bn.inputs[0])
    return ""


def _affine(bn: gs.Node) -> tuple[Array, Array] | None:
    values = [constant(bn, i) for i in range(1, 5)]
    if bn.attrs.get("training_mode", 0) or any(v is None for v in values):
        return None
    gamma, beta, mean, variance = (np.asarray(v, np.float64) for v in values)
    scale = gamma / np.sqrt(variance + float(np.float32(bn.attrs.get("epsilon", 1e-5))))
    return scale, beta - mean * scale


def _obstacle_before(graph: gs.Graph, bn: gs.Node, node: gs.Node | None) -> str:
    if node is None or node.op not in LINEAR:
        return "it is no convolution or matrix product"
    if sole_consumer(graph, node.outputs[0]) is not bn:
        return f"{node.name}'s result is read elsewhere too"
    if not isinstance(node.inputs[1], gs.Constant) or (_has_bias(node) and _bias(node) is None):
        return f"{node.name}'s weights are not constant"
    if node.op == "MatMul" and not (node.outputs[0].shape and len(node.outputs[0].shape) == 2):
        return f"{node.name}'s result is not of rank 2, its channels are not axis 1"
    return ""


def _obstacle_after(graph: gs.Graph, bn: gs.Node, nodes: list[gs.Node], shift: Array) -> str:
    if not nodes or any(bn.outputs[0] is t for t in graph.outputs):
        return "it is a graph output"
    for node in nodes:
        if node.op not in {"Conv", "Gemm"} or node.inputs[0] is not bn.outputs[0]:
            return f"{node.name} is no convolution or Gemm"
        if not isinstance(node.inputs[1], gs.Constant) or (_has_bias(node) and _bias(node) is None):
            return f"{node.name}'s weights are not constant"
        if node.op == "Gemm" and (node.attrs.get("transA", 0) or not bn.inputs[0].shape):
            return f"{node.name} transposes its input"
        if node.op == "Conv" and _pads(node) and shift.any():
            return f"{node.name} pads with zeros after the BatchNormalization"
    return ""


def _pads(node: gs.Node) -> bool:
    auto = node.attrs.get("auto_pad", "NOTSET")
    return any(node.attrs.get("pads", [])) if auto == "NOTSET" else auto != "VALID"


def _has_bias(node: gs.Node) -> bool:
    return len(node.inputs) > 2 and not node.inputs[2].is_empty()


def _bias(node: gs.Node) -> Array | None:
    return constant(node, 2)


def _scale_outputs(node: gs.Node, scale: Array, shift: Array) -> None:
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
    bias = _bias(node) if _has_bias(node) else None
    beta = node.attrs.pop("beta", 1.0)
    _set_weights(node, w, (0.0 if bias is None else bias.astype(np.float64) * beta) * scale + shift)


def _scale_inputs(node: gs.Node, scale: Array, shift: Array) -> None:
    w = np.asarray(node.inputs[1].values, np.float64)
    bias = _bias(node) if _has_bias(node) else None
    start = 0.0 if bias is None else bias.astype(np.float64)
    if node.op == "Gemm":
        w = w * node.attrs.pop("alpha", 1.0)
        rows = w if node.attrs.get("transB", 0) else w.T
        added = rows @ shift
        w = w * (scale if node.attrs.get("transB", 0) else scale[:, None])
        _set_weights(node, w, start * node.attrs.pop("beta", 1.0) + added)
        return
    group = node.attrs.get("group", 1)
    grouped = w.reshape(group, -1, *w.shape[1:])
    ones = [1] * (w.ndim - 2)
    added = (grouped * shift.reshape(group, 1, -1, *ones)).reshape(len(w), -1).sum(axis=1)
    w = (grouped * scale.reshape(group, 1, -1, *ones)).reshape(w.shape)
    _set_weights(node, w, start + added)


def _set_weights(node: gs.Node, w: Array, bias: Array) -> None:
    old = node.inputs[1]
    name = old.name if len(old.outputs) == 1 else f"{node.outputs[0].name}_weight"
    weight = gs.Constant(name, np.ascontiguousarray(w, np.float32))
    node.inputs = [
        node.inputs[0],
        weight,
        gs.Constant(f"{name}_bias", np.ascontiguousarray(bias, np.float32)),
    ]
