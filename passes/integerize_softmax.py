"""Turns Softmax and LogSoftmax into integers: exponentials of what lies below the row's maximum.

Before: `q = QuantizeLinear(Softmax(DequantizeLinear(x)))`.
After: `q = requantize(kernels.softmax(x))`, all integers: e = exp(x - max), e / sum(e).
Condition: rows of up to 65,536 elements; so long may a dynamic axis be.
Law: every element equals `grid.requantize` of the kernel's result. In a row, equal integers give
equal results, and no larger one gives a lower result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnx_intq.kernels.exponential import Mode
from onnx_intq.kernels.softmax import log_softmax, softmax
from onnx_intq.lowering import CannotLowerError, Site, lower
from onnx_intq.nonlinear import for_rows, mode_named, requantized
from onnx_intq.trace import LONGEST, Builder, Value
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class IntegerizeSoftmax(Pass):
    """Lower Softmax and LogSoftmax.

    Attributes:
        mode: "poly", "paper" or "lut"; for 16-bit inputs, "lut" is "poly".
        target: As for `integerize_nonlinear`.
    """

    mode: str = "poly"
    target: str = "integer"

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        mode = mode_named(self.mode)

        def emit(site: Site, builder: Builder) -> Value:
            return _emit(site, builder, mode)

        return lower(model, ctx, {"Softmax", "LogSoftmax"}, emit, target=self.target)


def _emit(site: Site, builder: Builder, mode: Mode) -> Value:
    x, axis = site.operand(0), _axis_from_the_end(site.node)
    q, mode = x.stored(builder), for_rows(mode, x)  # differences know no zero point
    if site.node.op == "LogSoftmax":
        return requantized(site, builder, *log_softmax(q, x.scale, axis, mode))
    bits = 15 if site.result.grid.bits == 8 else 16
    return requantized(site, builder, *softmax(q, x.scale, axis, mode, bits))


def _axis_from_the_end(node: gs.Node) -> int:
    axis, shape = int(node.attrs.get("axis", -1)), node.inputs[0].shape
    if shape is None and axis >= 0:
        raise CannotLowerError("the rank of its input is unknown; expected its axis from the end")
    axis = axis - len(shape) if shape is not None and axis >= 0 else axis
    size = shape[axis] if shape is not None else None
    if isinstance(size, int) and size > LONGEST:
        raise CannotLowerError(f"its rows have {size} elements; expected at most {LONGEST}")
    return axis
