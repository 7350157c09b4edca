"""Turns elementwise functions into integers: by polynomials, or by tables.

Before: `q = QuantizeLinear(Sigmoid(DequantizeLinear(x)))`.
After: mode 'poly' or 'paper': `q = requantize(kernels.sigmoid(x - z))`; mode 'lut': `q = Gather(t,
x)`, t the function at each integer of x. All integers.
x * Sigmoid(x) is one function where nothing stands between. Operators without a kernel take tables
in any mode; a table of a 16-bit input has 65,536 entries.
Condition: one input is computed; a second one, Pow's, is a constant scalar.
Law: every element equals `grid.requantize` of the kernel's result, or the rounded function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.composites import gates_itself, swish
from onnx_intq.kernels.division import reciprocal
from onnx_intq.kernels.erf import erf, gelu
from onnx_intq.kernels.exponential import Mode, exp
from onnx_intq.kernels.sigmoid import glu, sigmoid, tanh
from onnx_intq.kernels.table import table
from onnx_intq.lowering import CannotLowerError, Operand, Site, constant_values, lower
from onnx_intq.nonlinear import mode_named, requantized
from onnx_intq.scalar_functions import UNARY, Function, function, variable
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass

Kernel = Callable[[Site, Any, float, Mode], tuple[Any, float]]


@dataclass(frozen=True, kw_only=True)
class IntegerizeNonlinear(Pass):
    """Lower elementwise functions.

    Attributes:
        mode: "poly", "paper" or "lut".
    """

    mode: str = "poly"

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many functions were."""
        mode = mode_named(self.mode)

        def emit(site: Site, builder: Builder) -> Value:
            return _emit(site, builder, mode)

        count = lower(model, ctx, {"Mul"}, emit, where=swish)
        alone = {*UNARY, "Pow"}
        return count + lower(model, ctx, alone, emit, where=lambda n: not gates_itself(n, model))


def _emit(site: Site, builder: Builder, mode: Mode) -> Value:
    # Behind a Sigmoid that gates its own input, the operand is the Sigmoid's.
    gate, index = swish(site.node), variable(site.node)
    if gate is None and index is None:
        raise CannotLowerError("no input or several are computed; expected one, others scalar")
    x = site.operand(index or 0) if gate is None else replace(site, node=gate).operand(0)
    kernel = KERNELS.get(site.node.op) if index != 1 else None
    if mode == "lut" or kernel is None or not _has_kernel(site.node):
        return _looked_up(site, builder, x, function(site.node) if gate is None else _swish)
    return requantized(site, builder, *kernel(site, x.centred(builder), x.scale, mode))


def _looked_up(site: Site, builder: Builder, x: Operand, computed: Function) -> Value:
    """One entry per integer of the input; negative ones count from the table's end."""
    result, low = site.result, x.grid.low
    entries = table(
        computed,
        *(x.scale, x.zero_point, low, x.grid.high),
        *(result.scale, result.zero_point, site.first, site.last),
    )
    stored = builder.constant(np.roll(entries, low), result.grid.dtype)
    inputs = [stored, x.stored(builder).astype(np.int32)]
    tensor = builder.node("Gather", inputs, result.grid.dtype, x.tensor.shape, axis=0)
    return builder.value(tensor, int(entries.min()), int(entries.max()))


def _has_kernel(node: gs.Node) -> bool:
    if node.op == "Pow":
        exponent = constant_values(node.inputs[1])
        return exponent is not None and float(exponent.reshape(())) == 2.0
    return float(node.attrs.get("alpha", 1.0)) > 0


def _exp(site: Site, q: Any, scale: float, mode: Mode) -> tuple[Any, float]:
    """exp(x) = exp(x - top) exp(top): above `top`, the result's grid ends."""
    ceiling = math.log(max(site.result.high, site.result.scale))
    top = min(q.high, math.ceil(ceiling / scale))
    values, step = exp(q - top, scale, mode)
    return values, step * math.exp(top * scale)


def _swish(x: Any) -> Any:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


KERNELS: Mapping[str, Kernel] = {
    "Sigmoid": lambda _, q, scale, mode: sigmoid(q, scale, mode),
    "Tanh": lambda _, q, scale, mode: tanh(q, scale, mode),
    "Erf": lambda _, q, scale, mode: erf(q, scale, mode),
    "Gelu": lambda _, q, scale, mode: gelu(q, scale, mode),
    "Exp": _exp,
    "Reciprocal": lambda _, q, scale, __: reciprocal(q, scale),
    "Pow": lambda _, q, scale, __: (q * q, scale**2),
    "Mul": lambda _, q, scale, mode: glu(q, scale, q, scale, mode),
    "Swish": lambda s, q, scale, mode: glu(q, scale, q, scale * _alpha(s.node), mode),
}
"""Mul stands for x * Sigmoid(x). The tanh form of GELU is off by 4.8e-4, kernels are by more."""


def _alpha(node: gs.Node) -> float:
    return float(node.attrs.get("alpha", 1.0))
