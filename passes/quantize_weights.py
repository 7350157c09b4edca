"""Stores the weights of quantized operators as integers, one scale per output channel.

Before: `y = Conv(dequantized, w)`, w float32.
After: `y = Conv(dequantized, DequantizeLinear(int8 constant, scales, 0, axis))`.
Condition: the operator reads a DequantizeLinear (it runs on integers). A grid of less than 8 bits
is stored in int8; its width is recorded in the metadata under `onnx_intq.bits`.
A weight that was dequantized from integers, all else being float, is stored as these again.
Where a channel's bias would not fit into int32 in steps of input scale x weight scale, the weight
scale is raised until it does.
Where input and result are quantized, scales are moved by less than 2 %, those of "minmax" upwards
alone, so that float and integer arithmetic agree (`onnx_intq.alignment`).
Law: a weight inside its channel's range moves by at most half a step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.alignment import aligned
from onnx_intq.codebook import CodedWeight
from onnx_intq.coded_weights import scales_of
from onnx_intq.cost import BITS_KEY
from onnx_intq.graph import Names, metadata
from onnx_intq.grid import quantize, weight_grid, weight_scales
from onnx_intq.lloyd import nearest
from onnx_intq.transform import Context, Pass, PassError
from onnx_intq.weight_reads import (
    Read,
    activation_scales,
    bias_floor,
    reads_unsigned,
    weight_indices,
)
from onnx_intq.weight_sites import channel_axis


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Quantize constant weights.

    Attributes:
        bits: Width of the grid, 2..8.
        scale: "mse" or "minmax", see `grid.weight_scales`.
        overrides: (glob pattern of node names, bits) pairs; the last that matches wins.
        recurrent: Store the weights of an LSTM as well where its input is float: for TensorRT.
    """

    bits: int = 8
    scale: str = "mse"
    overrides: tuple[tuple[str, int], ...] = ()
    recurrent: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"quantized"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Quantize, each shared constant once; return how many weight tensors were quantized."""
        self._check()
        names, zeros = Names(model), dict[tuple[int, ...], gs.Constant]()
        widths: dict[str, int] = json.loads(metadata(model).get(BITS_KEY, "{}"))
        shared = self._shared(model)
        for (_, axis, bits), reads in shared.items():
            coded = _as_it_came(ctx, reads) or self._coded(model, reads, axis, bits)
            stored, dq = _append_dequantized(model, reads[0], coded, names, zeros)
            if coded.bits != 8:
                widths[stored.name] = coded.bits
            for node, index in reads:
                node.inputs[index] = dq
        if widths:
            metadata(model)[BITS_KEY] = json.dumps(widths, sort_keys=True)
        return len(shared)

    def _shared(self, model: gs.Graph) -> dict[tuple[int, int | None, int], list[Read]]:
        """(id of the weight, channel axis, bits) -> who reads it so."""
        shared: dict[tuple[int, int | None, int], list[Read]] = {}
        for node in model.nodes:
            for index in weight_indices(node, recurrent=self.recurrent):
                key = id(node.inputs[index]), channel_axis(node, index), self._bits(node.name)
                shared.setdefault(key, []).append((node, index))
        return shared

    def _check(self) -> None:
        for bits in (self.bits, *(b for _, b in self.overrides)):
            if bits not in range(2, 9):
                raise PassError(f"{bits}-bit weights; expected 2..8")
        if self.scale not in {"mse", "minmax"}:
            raise PassError(f"weight scale {self.scale!r}; expected 'mse' or 'minmax'")

    def _bits(self, name: str) -> int:
        matching = [bits for pattern, bits in self.overrides if fnmatchcase(name, pattern)]
        return matching[-1] if matching else self.bits

    def _coded(
        self, model: gs.Graph, reads: list[Read], axis: int | None, bits: int
    ) -> CodedWeight:
        """A weight on the grid."""
        node, index = reads[0]
        name, w = node.inputs[index].name, node.inputs[index].values
        if not np.isfinite(w).all():
            raise PassError(f"weight {name!r} holds NaN or infinity; expected finite values")
        scales = weight_scales(w, axis, bits, self.scale)
        floor = bias_floor(reads)
        scales = np.asarray(np.maximum(scales, floor))
        x_scale, y_scale = activation_scales(model, node, index)
        if x_scale and y_scale:
            scales = aligned(scales, x_scale, y_scale, scales if self.scale == "minmax" else floor)
        integers = quantize(w, scales, 0, weight_grid(bits), axis).astype(np.int8)
        return CodedWeight(stored=integers, scales=scales, axis=axis, bits=bits)


def _as_it_came(ctx: Context, reads: list[Read]) -> CodedWeight | None:
    """The integers that a weight was dequantized from, None where it was float or has changed.

    Channels whose bias would not fit keep their codebook, but get a larger scale.
    """
    node, index = reads[0]
    coded, w = ctx.coded.get((str(node.name), index)), node.inputs[index].values
    scales = None if coded is None else scales_of(coded, w)
    if coded is None or scales is None:
        return None
    floor = bias_floor(reads)
    raised = np.asarray(np.maximum(scales, floor if scales.ndim else floor.max()), np.float32)
    if np.array_equal(raised, scales):
        return replace(coded, scales=scales)
    kept = replace(coded, scales=raised)
    shape = [-1 if i == coded.axis else 1 for i in range(w.ndim)]
    steps, levels = raised.reshape(shape) if raised.ndim else raised, coded.centroids
    chosen = levels[nearest(levels, w / steps)]
    larger = (raised > scales).reshape(shape) if raised.ndim else True
    return replace(kept, stored=np.where(larger, chosen, coded.stored))


def _append_dequantized(
    model: gs.Graph,
    read: Read,
    coded: CodedWeight,
    names: Names,
    zeros: dict[tuple[int, ...], gs.Constant],
) -> tuple[gs.Constant, gs.Variable]:
    node, index = read
    name, scales = node.inputs[index].name, coded.scales
    unsigned = reads_unsigned(node, index)
    if scales.shape not in zeros and not unsigned:
        wish = "weight_zp_" + "x".join(map(str, scales.shape))
        zeros[scales.shape] = gs.Constant(names.new(wish), np.zeros(scales.shape, np.int8))
    stored = gs.Constant(names.new(f"{name}_q"), coded.stored)
    inputs = [stored, gs.Constant(names.new(f"{name}_scale"), scales)]
    inputs += [] if unsigned else [zeros[scales.shape]]
    dq = gs.Variable(names.new(f"{name}_dq"), dtype=np.float32, shape=coded.stored.shape)
    attrs = {} if coded.axis is None else {"axis": coded.axis}
    model.nodes.append(gs.Node("DequantizeLinear", dq.name, attrs, inputs, [dq]))
    return stored, dq
