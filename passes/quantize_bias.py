"""Stores the biases of quantized operators as int32, in steps of input scale x weight scale.

Before: `y = Conv(dequantized x, dequantized w, b)`, b float32.
After: `y = Conv(dequantized x, dequantized w, DequantizeLinear(int32 constant, sx * sw, 0))`.
Condition: both other inputs come from DequantizeLinear. onnxruntime only: TensorRT wants the bias
in float. A channel whose step is too fine for its bias to fit in 31 bits has its weight scale
raised: its weights (dead channels, as a rule) lose precision that the bias needs.
Law: a bias moves by at most half a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant, producer
from onnx_intq.transform import Context, Pass

Array = npt.NDArray[Any]
LARGEST_BIAS = 1 << 30
"""Magnitude bound of an int32 bias: the accumulator needs the other half of the range."""


@dataclass(frozen=True, kw_only=True)
class QuantizeBias(Pass):
    """Quantize the biases of Conv, ConvTranspose and Gemm."""

    needs: ClassVar[frozenset[str]] = frozenset({"quantized"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Quantize; return how many biases were."""
        nodes = [n for n in model.nodes if n.op in {"Conv", "ConvTranspose", "Gemm"}]
        return sum(_quantize(model, node, ctx) for node in nodes)


def _quantize(model: gs.Graph, node: gs.Node, ctx: Context) -> bool:
    bias = constant(node, 2)
    x, w = (producer(t) for t in node.inputs[:2])
    if bias is None or x is None or w is None or not x.op == w.op == "DequantizeLinear":
        return False
    if bias.ndim != 1 or constant(w, 0) is None or node.attrs.get("beta", 1.0) != 1.0:
        ctx.skip(node, "its bias is no plain vector and stays float")
        return False
    x_scale = x.inputs[1].values * np.float32(node.attrs.get("alpha", 1.0))
    needed = np.abs(bias).astype(np.float64) / (np.float64(x_scale) * LARGEST_BIAS)
    _raise_scales(w, needed)
    scale = np.broadcast_to(x_scale * w.inputs[1].values, bias.shape)
    q = np.rint(bias.astype(np.float64) / scale).astype(np.int32)
    name = f"{node.outputs[0].name}_bias"
    inputs = [
        gs.Constant(f"{name}_quantized", q),
        gs.Constant(f"{name}_scale", np.ascontiguousarray(scale, np.float32)),
        gs.Constant(f"{name}_zero_point", np.zeros(bias.shape, np.int32)),
    ]
    dq = gs.Variable(f"{name}_dequantized", dtype=np.float32, shape=bias.shape)
    model.nodes.append(gs.Node("DequantizeLinear", f"{name}_dq", {"axis": 0}, inputs, [dq]))
    node.inputs[2] = dq
    return True


def _raise_scales(dequantize: gs.Node, needed: Array) -> None:
    """Raise weight scales below `needed` (one per channel), and round the weights anew."""
    weight, scales = dequantize.inputs[0], dequantize.inputs[1]
    old = scales.values
    new = np.maximum(old, (needed if old.ndim else needed.max()).astype(np.float32))
    if (new == old).all():
        return
    shape = [1] * weight.values.ndim
    if old.ndim:
        shape[dequantize.attrs["axis"]] = -1
    ratio = (old.astype(np.float64) / new).reshape(shape)
    weight.values = np.rint(weight.values * ratio).astype(weight.values.dtype)
    scales.values = np.asarray(new, np.float32)
