"""The constant weights of a graph that may be stored in few bits, and the axis of their scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

RECURRENT = {"LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2)}
"""Operators with two weights each, [directions, gates x hidden, inputs]: which inputs they are."""
SMALLEST_TABLE = 1024
"""Numbers in a table behind Gather that is worth storing in fewer bits."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A weight, and where it is read.

    Attributes:
        name: Of the constant.
        constant: float32.
        axis: Of its output channels, one scale each; None for one scale.
        nodes: Names of the nodes that multiply by it, or gather from it, in graph order.
    """

    name: str
    constant: gs.Constant
    axis: int | None
    nodes: tuple[str, ...]


def quantizable_weights(graph: gs.Graph) -> list[Site]:
    """The float32 weights of convolutions, products, recurrent layers and tables, in graph order.

    A weight that is read in several places is one site; where these want scales along different
    axes, it has one scale. Those in the bodies of nodes are left out.
    """
    found: dict[int, tuple[gs.Constant, list[int | None], list[str]]] = {}
    for node in graph.nodes:
        for index in _weights(node):
            tensor = node.inputs[index]
            _, axes, names = found.setdefault(id(tensor), (tensor, [], []))
            axes.append(channel_axis(node, index))
            names.append(str(node.name))
    return [
        Site(
            name=tensor.name,
            constant=tensor,
            axis=axes[0] if len({*axes}) == 1 else None,
            nodes=tuple(dict.fromkeys(names)),
        )
        for tensor, axes, names in found.values()
    ]


def channel_axis(node: gs.Node, index: int) -> int | None:
    """The output-channel axis of a weight; None where one scale must do for the whole tensor."""
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1 if node.attrs.get("group", 1) == 1 else None
    if node.op in RECURRENT:
        return 1
    if index == 0 or node.inputs[index].values.ndim != 2:
        return None
    return 0 if node.op == "Gemm" and node.attrs.get("transB", 0) else 1


def _weights(node: gs.Node) -> list[int]:
    """Which inputs of a node are weights."""
    if node.op in {"Conv", "ConvTranspose"}:
        places: tuple[int, ...] = (1,)
    elif node.op in {"MatMul", "Gemm"}:
        places = () if all(isinstance(t, gs.Constant) for t in node.inputs[:2]) else (0, 1)
    elif node.op == "Gather":
        places = (0,)
    else:
        places = RECURRENT.get(node.op, ())
    smallest = SMALLEST_TABLE if node.op == "Gather" else 1
    return [i for i in places if i < len(node.inputs) and _fits(node.inputs[i], smallest)]


def _fits(tensor: gs.Tensor, smallest: int) -> bool:
    if not isinstance(tensor, gs.Constant):
        return False
    return bool(tensor.dtype == np.float32 and tensor.values.ndim > 1) and (
        tensor.values.size >= smallest
    )
