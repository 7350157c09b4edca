"""Moves the biases of quantized products so that their results have the float model's means.

Before: `y = Conv(x', w', b)`, x' and w' on their grids.
After: `y = Conv(x', w', b + E[Conv(x, w, b) - Conv(x, w', b)])`, the mean over the data, one per
output channel; a product without a bias gets one.
The mean is over the float model's x: the weights' errors alone count (Nagel et al. 2019,
1906.04721, section 4.2). Where ranges clip peaks, means over the quantized model's own x would make
up for a few peaks by moving all values: on synthetic data for QuartzNet15x5 that lost 11 dB.
Condition: fact "reference", the float model; the weight is stored as integers, the bias in float.
Law: the mean error that the weights make in every channel vanishes on the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, constant
from onnx_intq.qdq import dequantizer, has_input
from onnx_intq.reference import Layer, layers, original_inputs, original_totals, totals
from onnx_intq.transform import Context, Pass, PassError

Array = npt.NDArray[Any]
LARGEST = 1.5 * (1 << 30)
"""Steps of input scale x weight scale: what int32 holds, with room for the accumulator."""


@dataclass(frozen=True, kw_only=True)
class CorrectBias(Pass):
    """Correct biases."""

    needs: ClassVar[frozenset[str]] = frozenset({"quantized", "data", "reference"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Correct; return how many biases were."""
        if ctx.reference is None:
            raise PassError("no float model is at hand; expected one; give --data in this run")
        names = Names(model)
        for layer in layers(model, ctx.reference):
            _add_bias(model, layer, names)
        chosen = []
        for layer in layers(model, ctx.reference):
            if why := _obstacle(layer):
                ctx.skip(layer.node, why)
            else:
                chosen.append(layer)
        for layer, x in original_inputs(ctx.reference, chosen, ctx.feeds):
            wanted = original_totals(ctx.reference, layer, x)
            _move(layer, _mean_errors(layer, wanted, totals(model, layer, x)), names)
        return len(chosen)


def _add_bias(model: gs.Graph, layer: Layer, names: Names) -> None:
    """Give a product without a bias one of zeros."""
    node = layer.node
    if layer.index != 1 or _place(layer) is not None:
        return
    if node.op != "MatMul":
        if not has_input(node, 2):
            zeros = gs.Constant(names.new(f"{node.name}_bias"), _zeros(layer))
            node.inputs = [*node.inputs[:2], zeros]
        return
    result = node.outputs[0]
    if layer.float_weight.ndim != 2 or any(result is t for t in model.outputs):
        return
    biased = gs.Variable(names.new(f"{result.name}_biased"), result.dtype, result.shape)
    for reader in list(result.outputs):
        reader.inputs = [biased if t is result else t for t in reader.inputs]
    zeros = gs.Constant(names.new(f"{node.name}_bias"), _zeros(layer))
    model.nodes.append(gs.Node("Add", biased.name, {}, [result, zeros], [biased]))


def _zeros(layer: Layer) -> Array:
    w, node = layer.float_weight, layer.node
    if node.op == "ConvTranspose":
        return np.zeros(w.shape[1] * node.attrs.get("group", 1), np.float32)
    first = node.op == "Conv" or node.attrs.get("transB", 0)
    return np.zeros(w.shape[0 if first else 1], np.float32)


def _place(layer: Layer) -> tuple[gs.Node, int] | None:
    """The node that adds a constant bias, and at which input."""
    node, last = layer.node, layer.total.inputs[0]
    if node.op != "MatMul":
        return (node, 2) if constant(node, 2) is not None else None
    constants = [i for i in range(2) if last is not node and constant(last, i) is not None]
    return (last, constants[0]) if constants else None


def _obstacle(layer: Layer) -> str:
    """Why a product's bias stays, "" if it need not."""
    place = _place(layer)
    if layer.index != 1 or place is None:
        return "its bias is not constant, or its weight stands on the left"
    if place[0].op == "Gemm" and place[0].attrs.get("beta", 1.0) == 0:
        return "its bias has the factor 0"
    shape = place[0].inputs[place[1]].values.shape
    return "" if all(n == 1 for n in shape[:-1]) else "its bias is no vector"


def _mean_errors(
    layer: Layer, wanted: Sequence[Array], found: Sequence[Array]
) -> npt.NDArray[np.float64]:
    """The mean error of every output channel, over all batches."""
    axis = 1 if layer.node.op in {"Conv", "ConvTranspose"} else -1
    moved = [np.moveaxis(y - z, axis, -1) for y, z in zip(wanted, found, strict=True)]
    errors = np.concatenate([y.reshape(-1, y.shape[-1]) for y in moved])
    means: npt.NDArray[np.float64] = np.mean(errors, axis=0, dtype=np.float64)
    return means


def _move(layer: Layer, error: Array, names: Names) -> None:
    node, index = _place(layer) or (layer.node, 2)
    old = node.inputs[index]
    factor = node.attrs.get("beta", 1.0) if node.op == "Gemm" else 1.0
    moved = old.values + error / factor
    # A dead channel has tiny steps, of which int32 holds few.
    x_dequantizer = dequantizer(layer.x)
    x_scale = constant(x_dequantizer, 1) if x_dequantizer is not None else None
    w_scale = constant(layer.dequantizer, 1)
    if x_scale is not None and w_scale is not None and x_scale.size == 1:
        step = np.float64(x_scale.reshape(())) * w_scale
        fits = np.abs(moved) < LARGEST * abs(layer.node.attrs.get("alpha", 1.0)) * step
        moved = np.where(fits, moved, np.broadcast_to(old.values, moved.shape))
    name = names.new(f"{old.name}_corrected")
    node.inputs[index] = gs.Constant(name, np.asarray(moved, np.float32))
