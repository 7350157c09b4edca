"""Folds constants that are added to a matrix product behind a Reshape into the product's bias.

Before: `h = Reshape(Add(MatMul(x, w), b)); y = Add(h, u); z = Add(h, v)`.
After: `y = Reshape(Add(MatMul(x, w), b + u)); z = Reshape(Add(MatMul(x, w), b + v))`.
So for the two position biases of relative attention (Dai et al., Transformer-XL, 2019). On
integers, two products of 8 bits with a bias cost less than one with two sums behind it, and round
once in place of twice; they share their weights.
Condition: w and b are constant, nothing but such sums reads h, the Reshape splits the last axis,
and the constants run along its parts.
Law: outputs do not change but for float32 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, constant, producer
from onnx_intq.placement import is_bias
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class FoldBias(Pass):
    """Fold sums behind a Reshape into the bias before it."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Fold; return how many sums were."""
        names, count = Names(model), 0
        outputs = {id(t) for t in model.outputs}
        for reshape in [n for n in model.nodes if n.op == "Reshape"]:
            sums = _sums(reshape)
            if not sums:
                continue
            why = _obstacle(reshape, sums, outputs)
            if why:
                ctx.skip(reshape, why)
                continue
            for node in sums:
                _fold(model, reshape, node, names)
            count += len(sums)
        if count:
            model.cleanup(remove_unused_graph_inputs=False)
        return count


def _sums(reshape: gs.Node) -> list[gs.Node]:
    """The nodes that add a constant to what a node has reshaped, if all its readers do."""
    (split,) = reshape.outputs
    readers = [n for n in split.outputs if n.op != "Shape"]
    adds = [n for n in readers if n.op == "Add" and _added(n) is not None]
    biased = producer(reshape.inputs[0])
    if biased is None or not is_bias(biased) or len(adds) < len(readers):
        return []
    return adds


def _added(node: gs.Node) -> npt.NDArray[np.float32] | None:
    values = [constant(node, i) for i in range(2)]
    return next((v for v in values if v is not None), None)


def _obstacle(reshape: gs.Node, sums: list[gs.Node], outputs: set[int]) -> str:
    """Why the sums cannot be folded, "" if they can."""
    (split,), joined = reshape.outputs, reshape.inputs[0]
    biased = joined.inputs[0]
    product = producer(biased.inputs[_product_index(biased)])
    if product is None or constant(product, 1) is None:
        return "the weights of the product before it are computed"
    bias = _added(biased)
    if bias is None or bias.ndim != 1:
        return "the bias before it is no vector"
    if id(split) in outputs or any(n.op == "Shape" for n in split.outputs):
        return "something else reads it"
    parts = _parts(reshape, bias.size)
    if parts is None or any(not _fits(_added(n), parts) for n in sums):
        return "the constants do not run along the parts of the axis that it splits"
    return ""


def _product_index(biased: gs.Node) -> int:
    return 1 if constant(biased, 0) is not None else 0


def _parts(reshape: gs.Node, size: int) -> tuple[int, ...] | None:
    """The last axes of what a node has reshaped that together have `size` elements."""
    parts: tuple[int, ...] = ()
    for length in _last_sizes(reshape):
        parts = (length, *parts)
        if math.prod(parts) == size:
            return parts
    return None


def _last_sizes(reshape: gs.Node) -> Iterator[int]:
    """The sizes of its result's axes that are known, from the last on."""
    maker = producer(reshape.inputs[1])
    pieces = (
        list(maker.inputs) if maker is not None and maker.op == "Concat" else [reshape.inputs[1]]
    )
    for piece in reversed(pieces):
        values = piece.values.reshape(-1) if isinstance(piece, gs.Constant) else np.zeros(1)
        for length in reversed(values.tolist()):
            if length <= 0:
                return
            yield int(length)


def _fits(values: npt.NDArray[np.float32] | None, parts: tuple[int, ...]) -> bool:
    """Whether values broadcast to the parts, and do not differ along other axes."""
    if values is None:
        return False
    leading = values.shape[: -len(parts)]
    tail = values.shape[-len(parts) :]
    return all(n == 1 for n in leading) and all(
        n in {1, size} for n, size in zip(tail[::-1], parts[::-1], strict=False)
    )


def _fold(model: gs.Graph, reshape: gs.Node, node: gs.Node, names: Names) -> None:
    """Let a product of its own make the sum's result."""
    (result,), biased, values = node.outputs, producer(reshape.inputs[0]), _added(node)
    assert biased is not None  # noqa: S101  such were chosen
    assert values is not None  # noqa: S101
    product, bias = producer(biased.inputs[_product_index(biased)]), _added(biased)
    assert product is not None  # noqa: S101
    assert bias is not None  # noqa: S101
    parts = _parts(reshape, bias.size)
    assert parts is not None  # noqa: S101
    added = np.broadcast_to(values.reshape(values.shape[-len(parts) :]), parts).reshape(-1)
    total = np.asarray(bias.astype(np.float64) + added, bias.dtype)
    vector = gs.Constant(names.new(f"{result.name}_bias"), total)
    flat, sums = (
        gs.Variable(names.new(f"{result.name}_{kind}"), np.float32, biased.outputs[0].shape)
        for kind in ("product", "biased")
    )
    node.outputs.clear()
    made = [
        gs.Node("MatMul", f"{node.name}_product", {}, list(product.inputs), [flat]),
        gs.Node("Add", f"{node.name}_bias", {}, [flat, vector], [sums]),
        gs.Node("Reshape", node.name, dict(reshape.attrs), [sums, reshape.inputs[1]], [result]),
    ]
    place = model.nodes.index(reshape)
    model.nodes[place:place] = made
