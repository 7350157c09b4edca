"""Turns LSTM layers into integers: one product over all time for the input, a Scan for the state.

Before: `q = QuantizeLinear(LSTM(DequantizeLinear(x), w, r, b, , h, c))`.
After: `q, h', c' = Scan(h, c, MatMulInteger(x, w) * b + offset)`, whose body holds the recurrent
MatMulInteger and `kernels.lstm.Cell`; all integers. A layer of one step of time needs no Scan.
A direction in reverse scans in reverse; two directions are two Scans, joined.
Condition: weights are constant with a scale per row or one, x has 8 or 16 bits, the hidden states
8; no peepholes, clip or lengths of sequences, default activations. A cell has 16 bits and a power
of two for scale; one on another grid is requantised on its way in and out.
Law: every element equals that of `kernels.lstm.unrolled`, so a state fed back is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnx_intq.kernels.exponential import Mode
from onnx_intq.lowering import Site, lower
from onnx_intq.lstm_graph import emit_layer
from onnx_intq.lstm_layer import Layer, layer_at
from onnx_intq.moving import regrid
from onnx_intq.nonlinear import mode_named
from onnx_intq.products import check_cpu
from onnx_intq.trace import Builder
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class IntegerizeLstm(Pass):
    """Lower LSTM.

    Attributes:
        mode: "poly", "paper" or "lut": where sigmoid and tanh come from, see `kernels.lstm`.
        cpu: "any" or "vnni": whether weights are uint8 or int8, see `complete_qdq`.
    """

    mode: str = "poly"
    cpu: str = "any"

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        check_cpu(self.cpu)
        layers = _Layers(mode_named(self.mode), signed=self.cpu == "vnni")
        return lower(model, ctx, {"LSTM"}, layers.emit)


@dataclass(frozen=True, kw_only=False)
class _Layers:
    """Emits the nodes of a layer once; each of its outputs is a place of its own.

    Attributes:
        mode: Of sigmoid and tanh.
        signed: Whether weights are int8.
        made: id of an LSTM -> what it is, and its outputs.
    """

    mode: Mode
    signed: bool
    made: dict[int, tuple[Layer, list[gs.Tensor]]] = field(default_factory=dict)

    def emit(self, site: Site, builder: Builder) -> gs.Tensor:
        key = id(site.node)
        if key not in self.made:
            layer = layer_at(site)
            self.made[key] = layer, emit_layer(layer, builder, self.mode, signed=self.signed)
        layer, outputs = self.made[key]
        state = layer.cell if site.index == 2 else layer.hidden
        found = state.on(outputs[site.index])
        return regrid(found, site.result, builder, site.first, site.last).astype(
            site.result.grid.dtype
        )
