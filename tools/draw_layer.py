"""Draws one layer of a Q/DQ model beside the same layer of its integer-only model.

usage: python tools/draw_layer.py QDQ.onnx INTEGER.onnx TENSOR -o PICTURE.png
TENSOR is the quantized result of the layer, as both files name it (`..._q`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import load, producer
from onnx_intq.pictures import write_png
from onnx_intq.transform import IntqError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOAT, INTEGER = "#f4c7a1", "#a9cfa5"
"""Colours of nodes that give floats, and of those that give integers."""
HEIGHT = 0.62
"""Of a box; the rows are 1 apart."""
ROLES = {
    "DequantizeLinear": ("scale", "zero point"),
    "QuantizeLinear": ("scale", "zero point"),
    "Conv": ("weight", "bias"),
    "ConvInteger": ("weight", "input's zero point", "weight's zero point"),
    "Mul": ("factor",),
    "Add": ("bias, zero points, rounding",),
    "Div": ("divisor",),
    "Clip": ("low: ReLU", "high"),
    "Relu": (),
    "Cast": (),
}
"""What the inputs of an operator are, but for the first."""


def main() -> None:
    """Read the arguments and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("qdq", type=Path)
    parser.add_argument("integer", type=Path)
    parser.add_argument("tensor")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    draw(given.output, given.qdq, given.integer, given.tensor)


def draw(output: Path, qdq: Path, integer: Path, tensor: str) -> None:
    """Write the picture of the layer that ends in `tensor` in both files.

    Raises:
        IntqError: A file has no such tensor.
    """
    chains = [list(_layer(load(model), tensor)) for model in (qdq, integer)]
    titles = ("Q/DQ: integers on the edges, float32 between", "integer-only")
    write_png(output, lambda: _figure(chains, titles))


def _layer(graph: gs.Graph, tensor: str) -> Iterator[gs.Node]:
    """The nodes from the layer's quantized input to `tensor`, in order."""
    tensors = graph.tensors()
    if tensor not in tensors:
        raise IntqError(f"no tensor {tensor!r}; expected the quantized result of a layer")
    node = producer(tensors[tensor])
    found = [node]
    while not _starts(node):
        node = producer(node.inputs[0])
        found.append(node)
    yield from reversed(found)


def _starts(node: gs.Node) -> bool:
    return node.op in {"DequantizeLinear", "ConvInteger"}


def _figure(chains: list[list[gs.Node]], titles: tuple[str, ...]) -> Figure:
    from matplotlib.figure import Figure

    rows = max(len(chain) for chain in chains)
    figure = Figure(figsize=(11, 0.78 * rows + 1.1), layout="constrained")
    for axes, chain, title in zip(figure.subplots(1, 2), chains, titles, strict=True):
        axes.set(xlim=(0, 10), ylim=(-rows + 0.3, 0.75))
        axes.axis("off")
        axes.set_title(title, fontsize=12)
        _arrow(axes, -1, chain[0].inputs[0])
        for row, node in enumerate(chain):
            _box(axes, row, node)
            _arrow(axes, row, node.outputs[0])
    return figure


def _box(axes: Axes, row: int, node: gs.Node) -> None:
    from matplotlib.patches import FancyBboxPatch

    kind = np.dtype(node.outputs[0].dtype)
    style: dict[str, Any] = {"boxstyle": "round,pad=0.05", "edgecolor": "#555555"}
    colour = FLOAT if kind.kind == "f" else INTEGER
    corner = (0.2, -row - HEIGHT / 2)
    axes.add_patch(FancyBboxPatch(corner, 3.6, HEIGHT, facecolor=colour, **style))
    axes.text(2.0, -row, node.op, ha="center", va="center", fontsize=11)
    axes.text(4.2, -row, _constants(node), ha="left", va="center", fontsize=8.5, color="#333333")


def _arrow(axes: Axes, row: int, tensor: gs.Tensor) -> None:
    """From a row to the next, with the type that flows."""
    style = {"arrowstyle": "->", "color": "#555555"}
    axes.annotate("", (2.0, -row - 1 + HEIGHT / 2), (2.0, -row - HEIGHT / 2), arrowprops=style)
    name = np.dtype(tensor.dtype).name
    axes.text(2.15, -row - 0.5, name, ha="left", va="center", fontsize=8)


def _constants(node: gs.Node) -> str:
    """What the node reads besides the tensor that flows through it, one line each."""
    found = []
    for tensor, role in zip(node.inputs[1:], ROLES[node.op], strict=False):
        maker = producer(tensor)
        if maker is not None:
            found.append(f"{role}: DequantizeLinear({_describe(maker.inputs[0])})")
        elif isinstance(tensor, gs.Constant):
            found.append(f"{role}: {_describe(tensor)}")
    return "\n".join(found)


def _describe(tensor: gs.Constant) -> str:
    values = tensor.values
    number = "{:.4g}" if values.dtype.kind == "f" else "{:d}"
    low, high = number.format(values.min()), number.format(values.max())
    if values.size == 1:
        return f"{values.dtype.name} {low}"
    shape = " x ".join(map(str, values.shape))
    return f"{values.dtype.name} [{shape}], {low} .. {high}"


if __name__ == "__main__":
    main()
