"""Stores the weights of quantized operators as integers, one scale per output channel.

Before: `y = Conv(dequantized, w)`, w float32.
After: `y = Conv(dequantized, DequantizeLinear(int8 constant, scales, 0, axis))`.
Condition: the operator reads a DequantizeLinear (it runs on integers). A grid of less than 8 bits
is stored in int8; its width is recorded in the metadata under `onnx_intq.bits`.
Where a channel's bias would not fit into int32 in steps of input scale x weight scale, the weight
scale is raised until it does.
Where input and result are quantized, scales are moved by less than 2 %, those of "minmax" upwards
alone, so that float and integer arithmetic agree (`onnx_intq.alignment`).
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

from onnx_intq import qdq
from onnx_intq.alignment import aligned
from onnx_intq.cost import BITS_KEY
from onnx_intq.graph import Names, constant, metadata, producer, sole_consumer
from onnx_intq.grid import quantize, weight_grid, weight_scales
from onnx_intq.lowering import fused
from onnx_intq.placement import WEIGHTED
from onnx_intq.transform import Context, Pass, PassError

LARGEST_BIAS = 1 << 30
"""Magnitude bound of an int32 bias: the accumulator needs the other half of the range."""
Read = tuple[gs.Node, int]
"""A node, and which of its inputs."""


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
        names, zeros = Names(model), dict[tuple[int, ...], gs.Constant]()
        widths: dict[str, int] = json.loads(metadata(model).get(BITS_KEY, "{}"))
        shared = self._shared(model)
        for (_, axis, bits), reads in shared.items():
            stored, dq = self._append_dequantized(model, reads, axis, bits, names, zeros)
            if bits != 8:
                widths[stored.name] = bits
            for node, index in reads:
                node.inputs[index] = dq
        if widths:
            metadata(model)[BITS_KEY] = json.dumps(widths, sort_keys=True)
        return len(shared)

    def _shared(self, model: gs.Graph) -> dict[tuple[int, int | None, int], list[Read]]:
        """(id of the weight, channel axis, bits) -> who reads it so."""
        shared: dict[tuple[int, int | None, int], list[Read]] = {}
        for node in model.nodes:
            index = _weight_index(node)
            if index is not None:
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

    def _append_dequantized(
        self,
        model: gs.Graph,
        reads: list[Read],
        axis: int | None,
        bits: int,
        names: Names,
        zeros: dict[tuple[int, ...], gs.Constant],
    ) -> tuple[gs.Constant, gs.Variable]:
        node, index = reads[0]
        name, w = node.inputs[index].name, node.inputs[index].values
        if not np.isfinite(w).all():
            raise PassError(f"weight {name!r} holds NaN or infinity; expected finite values")
        scales = weight_scales(w, axis, bits, self.scale)
        floor = np.zeros((), np.float32)
        for reader, place in reads:
            floor = np.asarray(np.maximum(floor, _bias_floor(reader, place)))
        scales = np.asarray(np.maximum(scales, floor))
        x_scale, y_scale = _activation_scales(model, node, index)
        if x_scale and y_scale:
            scales = aligned(scales, x_scale, y_scale, scales if self.scale == "minmax" else floor)
        unsigned = _reads_unsigned(node, index)
        if scales.shape not in zeros and not unsigned:
            wish = "weight_zp_" + "x".join(map(str, scales.shape))
            zeros[scales.shape] = gs.Constant(names.new(wish), np.zeros(scales.shape, np.int8))
        stored = gs.Constant(
            names.new(f"{name}_q"), quantize(w, scales, 0, weight_grid(bits), axis)
        )
        inputs = [stored, gs.Constant(names.new(f"{name}_scale"), scales)]
        inputs += [] if unsigned else [zeros[scales.shape]]
        dq = gs.Variable(names.new(f"{name}_dq"), dtype=np.float32, shape=w.shape)
        attrs = {} if axis is None else {"axis": axis}
        model.nodes.append(gs.Node("DequantizeLinear", dq.name, attrs, inputs, [dq]))
        return stored, dq


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
    bias = constant(node, 2)
    if bias is None or bias.ndim != 1 or index == 0:
        return np.float32(0)
    (dequantize,) = node.inputs[0].inputs
    step = np.float64(dequantize.inputs[1].values) * LARGEST_BIAS
    factor = node.attrs.get("beta", 1.0) / node.attrs.get("alpha", 1.0)
    floor: npt.NDArray[np.float32] = (np.abs(bias * np.float64(factor)) / step).astype(np.float32)
    return floor if channel_axis(node, index) is not None else floor.max()


def _reads_unsigned(node: gs.Node, index: int) -> bool:
    """Whether the activation is unsigned, which is onnxruntime's dialect, not TensorRT's.

    TensorRT wants a zero point of 0 in writing. onnxruntime does not, and cannot load weights that
    share one where `session.x64quantprecision` is set on a processor without VNNI (1.31.1).
    """
    maker = producer(node.inputs[1 - index])
    return maker is not None and qdq.integer_type(maker).startswith("u")


def _activation_scales(model: gs.Graph, node: gs.Node, index: int) -> tuple[float, float]:
    """The scales of the other input and of the result, 0 where there is none."""
    quantizer = sole_consumer(model, fused(model, node)[-1].outputs[0])
    pair = producer(node.inputs[1 - index]), quantizer
    scales = [constant(n, 1) if n is not None and n.op in qdq.QDQ else None for n in pair]
    x, y = (0.0 if s is None or s.size != 1 else float(s.reshape(())) for s in scales)
    return x * abs(node.attrs.get("alpha", 1.0)), y


def _weight_index(node: gs.Node) -> int | None:
    """Which input is the constant weight, if the other is a dequantized activation."""
    places = {"MatMul": ((1, 0), (0, 1))}.get(node.op, ((1, 0),))
    for index, other in places if node.op in WEIGHTED else ():
        maker = producer(node.inputs[other])
        if isinstance(node.inputs[index], gs.Constant) and maker is not None:
            return index if maker.op == "DequantizeLinear" else None
    return None
