"""Turns elementwise functions into integers: by polynomials, or by tables.

Before: `q = QuantizeLinear(Sigmoid(DequantizeLinear(x)))`.
After: mode 'poly' or 'paper': `q = requantize(kernels.sigmoid(x - z))`; mode 'lut': `q = Gather(t,
x)`, t the function at each integer of x. All integers.
a * Sigmoid(b), x * Sigmoid(x) among these, is one function where nothing stands between. Operators
without a kernel take tables in any mode; a table of a 16-bit input has 65,536 entries.
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

from onnx_intq.composites import gate, gates, swish
from onnx_intq.graph import producer
from onnx_intq.kernels.division import reciprocal
from onnx_intq.kernels.erf import erf, gelu
from onnx_intq.kernels.exponential import Mode, exp
from onnx_intq.kernels.sigmoid import glu, sigmoid, tanh
from onnx_intq.kernels.table import lookup, table
from onnx_intq.lowering import CannotLowerError, Operand, Site, constant_values, lower
from onnx_intq.nonlinear import for_rows, mode_named, requantized
from onnx_intq.scalar_functions import UNARY, Function, function, variable
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass

Kernel = Callable[[Site, Any, float, Mode], tuple[Any, float]]


@dataclass(frozen=True, kw_only=True)
class IntegerizeNonlinear(Pass):
    """Lower elementwise functions.

    Attributes:
        mode: "poly", "paper" or "lut".
        target: "integer", or "tensorrt" for islands between Q/DQ pairs: see `insert_islands`.
    """

    mode: str = "poly"
    target: str = "integer"

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many functions were."""
        mode = mode_named(self.mode)

        def emit(site: Site, builder: Builder) -> Value:
            return _emit(site, builder, mode)

        def alone(node: gs.Node) -> bool:
            return not gates(node, model)

        count = lower(model, ctx, {"Mul"}, emit, where=gate, target=self.target)
        return count + lower(model, ctx, {*UNARY, "Pow"}, emit, where=alone, target=self.target)


def _emit(site: Site, builder: Builder, mode: Mode) -> Value:
    if (found := gate(site.node)) is not None:
        return _gated(site, builder, found, mode)
    index = variable(site.node)
    if index is None:
        raise CannotLowerError("no input or several are computed; expected one, others scalar")
    x, kernel = site.operand(index), KERNELS.get(site.node.op) if index == 0 else None
    if mode == "lut" or kernel is None or not _has_kernel(site.node):
        return _looked_up(site, builder, x, function(site.node))
    return requantized(site, builder, *kernel(site, x.centred(builder), x.scale, mode))


def _gated(site: Site, builder: Builder, sigmoid: gs.Node, mode: Mode) -> Value:
    """The product a * Sigmoid(b) as one function; a may be b."""
    b, is_swish = replace(site, node=sigmoid).operand(0), swish(site.node) is not None
    if is_swish and mode == "lut":
        return _looked_up(site, builder, b, _swish)
    x = b.centred(builder)
    if is_swish:
        return requantized(site, builder, *glu(x, b.scale, x, b.scale, mode))
    inputs = enumerate(site.node.inputs)
    a = site.operand(next(i for i, t in inputs if producer(t) is not sigmoid))
    gated = glu(a.centred(builder), a.scale, x, b.scale, for_rows(mode, b))
    return requantized(site, builder, *gated)


def _looked_up(site: Site, builder: Builder, x: Operand, computed: Function) -> Value:
    """One entry per integer of the input; for target integer, negative ones count from the end."""
    result, low = site.result, x.grid.low
    entries = table(
        computed,
        *(x.scale, x.zero_point, low, x.grid.high),
        *(result.scale, result.zero_point, site.first, site.last),
    )
    if builder.target == "tensorrt":
        found = lookup(x.stored(builder), entries, low)
        return builder.value(found.astype(result.grid.dtype), site.first, site.last)
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
    "Swish": lambda s, q, scale, mode: glu(q, scale, q, scale * _alpha(s.node), mode),
}
"""The tanh form of GELU is off by 4.8e-4, kernels are by more."""


def _alpha(node: gs.Node) -> float:
    return float(node.attrs.get("alpha", 1.0))
