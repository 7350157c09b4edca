"""Stores the weights of quantized operators as integers, one scale per output channel.

Before: `y = Conv(dequantized, w)`, w float32.
After: `y = Conv(dequantized, DequantizeLinear(int8 constant, scales, 0, axis))`.
Condition: the operator reads a DequantizeLinear (it runs on integers). A grid of less than 8 bits
is stored in int8; its width is recorded in the metadata under `onnx_intq.bits`.
Where a channel's bias would not fit into int32 in steps of input scale x weight scale, the weight
scale is raised until it does.
Law: a weight inside its channel's range moves by at most half a step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant, metadata, producer
from onnx_intq.grid import quantize, weight_grid, weight_scales
from onnx_intq.placement import WEIGHTED
from onnx_intq.transform import Context, Pass, PassError

BITS_KEY = "onnx_intq.bits"
LARGEST_BIAS = 1 << 30
"""Magnitude bound of an int32 bias: the accumulator needs the other half of the range."""


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Quantize constant weights.

    Attributes:
        bits: Width of the grid, 2..8.
        scale: "mse" or "minmax", see `grid.weight_scales`.
        overrides: (glob pattern of node names, bits) pairs; the last that matches wins.
    """

    bits: int = 8
    scale: str = "mse"
    overrides: tuple[tuple[str, int], ...] = ()

    needs: ClassVar[frozenset[str]] = frozenset({"quantized"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Quantize, each shared constant once; return how many weight tensors were quantized."""
        self._check()
        done: dict[int, gs.Tensor] = {}
        zeros: dict[tuple[int, ...], gs.Constant] = {}
        widths: dict[str, int] = json.loads(metadata(model).get(BITS_KEY, "{}"))
        for node in [n for n in model.nodes if n.op in WEIGHTED]:
            index = _weight_index(node)
            if index is None:
                continue
            weight = node.inputs[index]
            if id(weight) not in done:
                bits = self._bits(node.name)
                done[id(weight)] = self._dequantized(model, node, index, bits, zeros)
                if bits != 8:
                    widths[weight.name] = bits
            node.inputs[index] = done[id(weight)]
        if widths:
            metadata(model)[BITS_KEY] = json.dumps(widths, sort_keys=True)
        return len(done)

    def _check(self) -> None:
        for bits in (self.bits, *(b for _, b in self.overrides)):
            if bits not in range(2, 9):
                raise PassError(f"{bits}-bit weights; expected 2..8")
        if self.scale not in {"mse", "minmax"}:
            raise PassError(f"weight scale {self.scale!r}; expected 'mse' or 'minmax'")

    def _bits(self, name: str) -> int:
        matching = [bits for pattern, bits in self.overrides if fnmatchcase(name, pattern)]
        return matching[-1] if matching else self.bits

    def _dequantized(
        self,
        model: gs.Graph,
        node: gs.Node,
        index: int,
        bits: int,
        zeros: dict[tuple[int, ...], gs.Constant],
    ) -> gs.Tensor:
        weight, axis = node.inputs[index], channel_axis(node, index)
        w = weight.values
        if not np.isfinite(w).all():
            raise PassError(f"weight {weight.name!r} holds NaN or infinity; expected finite values")
        scales = np.maximum(weight_scales(w, axis, bits, self.scale), _bias_floor(node, index))
        q = quantize(w, scales, 0, weight_grid(bits), axis)
        if scales.shape not in zeros:
            name = "weight_zp_" + "x".join(map(str, scales.shape))
            zeros[scales.shape] = gs.Constant(name, np.zeros(scales.shape, np.int8))
        inputs = [
            gs.Constant(f"{weight.name}_q", q),
            gs.Constant(f"{weight.name}_scale", scales),
            zeros[scales.shape],
        ]
        dq = gs.Variable(f"{weight.name}_dq", dtype=np.float32, shape=w.shape)
        attrs = {} if axis is None else {"axis": axis}
        model.nodes.append(gs.Node("DequantizeLinear", f"{weight.name}_dq", attrs, inputs, [dq]))
        return dq


def channel_axis(node: gs.Node, index: int) -> int | None:
    """The output-channel axis of a weight; None where one scale must do for the whole tensor."""
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1 if node.attrs.get("group", 1) == 1 else None
    if index == 0 or node.inputs[index].values.ndim != 2:
        return None
    return 0 if node.op == "Gemm" and node.attrs.get("transB", 0) else 1


def _bias_floor(node: gs.Node, index: int) -> npt.NDArray[np.float32] | np.float32:
    """Scales below which the bias would not fit into int32 in steps of input x weight scale.

    Runtimes quantize it so. Dead channels are concerned, as a rule: tiny weights, ordinary bias.
    """
    bias = constant(node, 2) if node.op != "MatMul" else None
    if bias is None or bias.ndim != 1 or index == 0:
        return np.float32(0)
    (dequantize,) = node.inputs[0].inputs
    step = np.float64(dequantize.inputs[1].values) * LARGEST_BIAS
    floor: npt.NDArray[np.float32] = (np.abs(bias) / step).astype(np.float32)
    return floor if channel_axis(node, index) is not None else floor.max()


def _weight_index(node: gs.Node) -> int | None:
    """Which input is the constant weight, if the other is a dequantized activation."""
    for index, other in ((1, 0), (0, 1)):
        maker = producer(node.inputs[other])
        if isinstance(node.inputs[index], gs.Constant) and maker is not None:
            return index if maker.op == "DequantizeLinear" else None
    return None
