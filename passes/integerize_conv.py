"""Turns quantized convolutions into ConvInteger and an integer requantisation.

Before: `q = QuantizeLinear(Relu(Conv(DequantizeLinear(x), DequantizeLinear(w), b)))`.
After: `q = Cast(Clip(Div(Add(Mul(ConvInteger(x, w), m), r), d)))`, all integers.
Weights are stored as uint8 with zero point 128, activations as int8: onnxruntime's fast form. Bias,
zero points, rounding and the activation are folded into r and the limits of Clip. An input of 16
bits takes two ConvInteger, of its high and its low bytes (`onnx_intq.place_values`).
Condition: weights are constant.
Law: every element equals `grid.requantize` of the exact sum, by a multiplier that is at most
`requantization.PRECISION` off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnx_intq.lowering import CannotLowerError, Site, lower
from onnx_intq.place_values import digits
from onnx_intq.products import bias, check_cpu, convolution, step, weight
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class IntegerizeConv(Pass):
    """Lower Conv.

    Attributes:
        cpu: "any" or "vnni": whether the bytes of 16-bit inputs are uint8 or int8, the type of
            which `complete_qdq` makes inputs of 8 bits.
    """

    cpu: str = "any"

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        check_cpu(self.cpu)

        def emit(site: Site, builder: Builder) -> Value:
            return _emit(site, builder, signed=self.cpu == "vnni")

        return lower(model, ctx, {"Conv"}, emit)


def _emit(site: Site, builder: Builder, *, signed: bool) -> Value:
    x, w = site.operand(0), weight(site.node.inputs[1])
    if w.scales.size > 1 and w.axis != 0:
        raise CannotLowerError("its weight has scales along another axis than output channels")
    chosen = step(site, x, w, w.centred.reshape(len(w.centred), -1), bias(site))
    return convolution(site, builder, digits(x, builder, signed=signed), w, chosen, site.node.attrs)
