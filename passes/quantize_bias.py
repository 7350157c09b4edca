"""Stores the biases of quantized operators as int32, in steps of input scale x weight scale.

Before: `y = Conv(dequantized x, dequantized w, b)`, b float32.
After: `y = Conv(dequantized x, dequantized w, DequantizeLinear(int32 constant, sx * sw, 0))`.
Condition: both other inputs come from DequantizeLinear. onnxruntime only: TensorRT wants the bias
in float, and onnxruntime >= 1.24 does the same by itself; other runtimes may not.
Law: a bias moves by at most half a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, constant, producer
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class QuantizeBias(Pass):
    """Quantize the biases of Conv, ConvTranspose and Gemm."""

    needs: ClassVar[frozenset[str]] = frozenset({"quantized"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Quantize; return how many biases were."""
        nodes = [n for n in model.nodes if n.op in {"Conv", "ConvTranspose", "Gemm"}]
        names = Names(model)
        return sum(_quantize(model, node, names, ctx) for node in nodes)


def _quantize(model: gs.Graph, node: gs.Node, names: Names, ctx: Context) -> bool:
    bias = constant(node, 2)
    makers = [producer(t) for t in node.inputs[:2]]
    if bias is None or any(m is None or m.op != "DequantizeLinear" for m in makers):
        return False
    x_scale, w_scale = (constant(maker, 1) for maker in makers)
    if x_scale is None or w_scale is None:
        ctx.skip(node, "its scales are computed at run time, and its bias stays float")
        return False
    scale = x_scale * w_scale * np.float32(node.attrs.get("alpha", 1.0))
    if bias.ndim != 1 or scale.shape not in {(), bias.shape} or node.attrs.get("beta", 1.0) != 1.0:
        ctx.skip(node, "its bias is no plain vector and stays float")
        return False
    if not (scale > 0).all():
        ctx.skip(node, "its scales are not positive, and its bias stays float")
        return False
    scale = np.broadcast_to(scale, bias.shape)
    steps = np.rint(bias.astype(np.float64) / scale)
    if np.abs(steps).max(initial=0) > np.iinfo(np.int32).max:
        ctx.skip(node, "its bias does not fit into int32 and stays float")
        return False
    name = f"{node.outputs[0].name}_bias"
    inputs = [
        gs.Constant(names.new(f"{name}_q"), steps.astype(np.int32)),
        gs.Constant(names.new(f"{name}_scale"), np.ascontiguousarray(scale, np.float32)),
    ]
    dq = gs.Variable(names.new(f"{name}_dq"), dtype=np.float32, shape=bias.shape)
    model.nodes.append(gs.Node("DequantizeLinear", dq.name, {"axis": 0}, inputs, [dq]))
    node.inputs[2] = dq
    return True
