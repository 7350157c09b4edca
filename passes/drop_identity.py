"""Removes nodes that return their input: Identity, Dropout, Cast to the same type, no-op Transpose.

Before: `y = Identity(x)`, z = f(y).   After: z = f(x).
Condition: the node is not needed to join a graph input to a graph output of another name.
Law: outputs do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant, remove, replace_uses, subgraphs
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class DropIdentity(Pass):
    """Remove operators that change nothing at inference."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Remove such nodes, bodies included; return how many."""
        dropped = 0
        for sub in subgraphs(model):
            own = {id(node) for node in sub.nodes}
            gone = [
                node for node in sub.nodes if _returns_input(node) and _drop(sub, node, own, ctx)
            ]
            remove(sub, gone)
            dropped += len(gone)
        return dropped


def _drop(graph: gs.Graph, node: gs.Node, own: set[int], ctx: Context) -> bool:
    source, result = node.inputs[0], node.outputs[0]
    is_output = any(result is t for t in graph.outputs)
    if is_output and (not source.inputs or any(source is t for t in graph.outputs)):
        ctx.skip(node, "joins a graph output to a tensor that must keep its own name")
        return False
    if is_output and id(source.inputs[0]) not in own:
        ctx.skip(node, "joins a body's output to a tensor outside the body")
        return False
    replace_uses(graph, result, source)
    return True


def _returns_input(node: gs.Node) -> bool:
    if node.op == "Dropout":
        training = constant(node, 2)
        given = len(node.inputs) > 2 and not node.inputs[2].is_empty()
        mask_used = len(node.outputs) > 1 and bool(node.outputs[1].outputs)
        return not mask_used and (not given or (training is not None and not training.any()))
    if node.op == "Cast":
        dtype = node.inputs[0].dtype
        return dtype is not None and _element_type(dtype) == node.attrs["to"]
    if node.op == "Transpose":
        perm = list(node.attrs.get("perm", []))
        return bool(perm) and perm == sorted(perm)
    return bool(node.op == "Identity")


def _element_type(dtype: Any) -> int:
    """ONNX's number of a tensor's type; graphsurgeon holds NumPy types, or numbers for others."""
    if isinstance(dtype, int):
        return dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
