"""Removes nodes that return their input: Identity, Dropout, Cast to the same type, no-op Transpose.

Before: `y = Identity(x)`, z = f(y).   After: z = f(x).
Condition: the node is not needed to join a graph input to a graph output of another name.
Law: outputs do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnx_intq.graph import constant, element_type, remove, replace_uses, subgraphs
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class DropIdentity(Pass):
    """Remove operators that change nothing at inference."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Remove such nodes, bodies included; return how many."""
        dropped = 0
        for sub in subgraphs(model):
            own = {id(node) for node in sub.nodes}
            found = [node for node in sub.nodes if _returns_input(sub, node)]
            gone = [node for node in found if _drop(sub, node, own, ctx)]
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


def _returns_input(graph: gs.Graph, node: gs.Node) -> bool:
    if node.domain:
        return False
    if node.op == "Dropout":
        return not _is_training(node) and not _mask_is_used(graph, node)
    if node.op == "Cast":
        return bool(element_type(node.inputs[0]) == node.attrs["to"])
    if node.op == "Transpose":
        perm = list(node.attrs.get("perm", []))
        return bool(perm) and perm == sorted(perm)
    return bool(node.op == "Identity")


def _is_training(dropout: gs.Node) -> bool:
    """Whether values are dropped, or may be: the switch is computed at run time."""
    if len(dropout.inputs) < 3 or dropout.inputs[2].is_empty():
        return False
    switch = constant(dropout, 2)
    return switch is None or bool(switch.any())


def _mask_is_used(graph: gs.Graph, dropout: gs.Node) -> bool:
    masks = dropout.outputs[1:]
    return any(mask.outputs or any(mask is t for t in graph.outputs) for mask in masks)
