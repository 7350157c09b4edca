"""Turns softmax(scores) @ v into integers that are normalised after the product.

Before: `q = QuantizeLinear(MatMul(DequantizeLinear(QuantizeLinear(Softmax(s))), v))`.
After: `q = MatMulInteger(e, v) * m / sum(e)`, all integers: e are the row's exponentials in 8 bits,
255 for its maximum, so that small probabilities are not lost to the grid of the weights, and one
division normalises and requantises.
A v of 16 bits is multiplied byte by byte.
Condition: the softmax runs over the last axis, nothing else reads it, no bias is added. Where that
does not hold, other passes lower both operators one by one: run this one before them.
Law: every element equals `kernels.softmax.softmax_matmul`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnx_intq.composites import attention
from onnx_intq.kernels.exponential import Mode
from onnx_intq.kernels.softmax import softmax_matmul
from onnx_intq.lowering import CannotLowerError, Site, lower
from onnx_intq.nonlinear import for_rows, mode_named
from onnx_intq.products import check_cpu
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass

WIDEST = {8: 128, 16: 256 * 128 + 128}
"""Bits -> what is taken off integers counted from 0, so that their bytes are int8: sums of products
with them fit int32 in rows of up to 2^16."""


@dataclass(frozen=True, kw_only=True)
class IntegerizeAttention(Pass):
    """Lower Softmax and the MatMul that reads it.

    Attributes:
        mode: "poly", "paper" or "lut"; for 16-bit scores, "lut" is "poly".
        cpu: "any" or "vnni": whether v is multiplied as uint8 or int8, see `complete_qdq`.
    """

    mode: str = "poly"
    cpu: str = "any"

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many pairs were."""
        mode = mode_named(self.mode)
        check_cpu(self.cpu)

        def emit(site: Site, builder: Builder) -> Value:
            builder.portable = self.cpu == "any"
            return _emit(site, builder, mode)

        return lower(model, ctx, {"MatMul"}, emit, where=attention, optional=True)


def _emit(site: Site, builder: Builder, mode: Mode) -> Value:
    softmax = attention(site.node)
    assert softmax is not None  # noqa: S101  only such nodes are lowered
    if not _is_over_the_last_axis(softmax):
        raise CannotLowerError("its softmax does not run over the last axis")
    scores, v = replace(site, node=softmax).operand(0), site.operand(1)
    if site.bias is not None:
        raise CannotLowerError("a bias is added")
    offset = v.grid.low + WIDEST[v.grid.bits]
    values = v.stored(builder)
    result = softmax_matmul(
        scores.stored(builder),
        scores.scale,
        values - offset if offset else values,
        v.scale / site.result.scale,
        v_zero_point=v.zero_point - offset,
        v_bits=v.grid.bits,
        zero_point=site.result.zero_point,
        low=site.first,
        high=site.last,
        mode=for_rows(mode, scores),
    )
    return builder.value(result.astype(site.result.grid.dtype), site.first, site.last)


def _is_over_the_last_axis(softmax: gs.Node) -> bool:
    axis, shape = softmax.attrs.get("axis", -1), softmax.inputs[0].shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)
