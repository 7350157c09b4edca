"""Turns quantized matrix products into MatMulInteger and an integer requantisation.

Before: `q = QuantizeLinear(Relu(Add(MatMul(DequantizeLinear(x), DequantizeLinear(w)), b)))`.
After: `q = Cast(Clip(Div(Add(Mul(MatMulInteger(x, w), m), r), d)))`, all integers.
Both factors are uint8, which every processor multiplies exactly; for processors with VNNI the
right one is int8, onnxruntime's fast form. An activation of the other type is shifted by 128. A
constant factor has one scale, or one per row on the left, per column on the right. Gemm's
transpositions, factors and third input are taken along. A factor of 16 bits is multiplied byte by
byte: two products, four where both have 16 (`onnx_intq.place_values`).
Condition: the largest sum there can be of products of 8 bits fits int32, and that of the bytes'
sums 41 bits.
Law: every element equals `grid.requantize` of the exact sum, by a multiplier that is at most
`requantization.PRECISION` off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.factors import (
    LEFT,
    RIGHT,
    Product,
    Term,
    alpha,
    by_activation,
    by_weight,
    is_constant,
)
from onnx_intq.lowering import CannotLowerError, Site, lower
from onnx_intq.place_values import total
from onnx_intq.products import check_bias, check_cpu
from onnx_intq.qdq import has_input
from onnx_intq.requantization import Step, emit
from onnx_intq.trace import Builder, Value
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class IntegerizeMatmul(Pass):
    """Lower MatMul and Gemm.

    Attributes:
        cpu: "any" or "vnni": whether the right factor is uint8 or int8, see `complete_qdq`.
    """

    cpu: str = "any"

    needs: ClassVar[frozenset[str]] = frozenset({"complete"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Lower; return how many nodes were."""
        check_cpu(self.cpu)

        def emit(site: Site, builder: Builder) -> Value:
            return _emit(site, builder, signed=self.cpu == "vnni")

        return lower(model, ctx, {"MatMul", "Gemm"}, emit)


def _emit(site: Site, builder: Builder, *, signed: bool) -> Value:
    if alpha(site) <= 0:
        raise CannotLowerError(f"its alpha is {alpha(site):g}; expected a positive factor")
    constants = [i for i in (LEFT, RIGHT) if is_constant(site.node.inputs[i])]
    if len(constants) == 2:
        raise CannotLowerError("both its factors are constant; run fold_constants before")
    if constants:
        product = by_weight(site, builder, constants[0], signed=signed)
    else:
        product = by_activation(site, builder, signed=signed)
    terms = [(term.place, _multiplied(site, builder, term)) for term in product.terms]
    value = total(terms, int(product.step.low.min()), int(product.step.high.max()))
    value, found = _with_bias(site, value, product)
    return emit(value, found, site.result.grid, product.units.shape)


def _multiplied(site: Site, builder: Builder, term: Term) -> Value:
    (left, a), (right, b) = term.factors
    zero_points = [builder.constant(a, left.dtype), builder.constant(b, right.dtype)]
    shape = site.node.outputs[0].shape
    acc = builder.node("MatMulInteger", [left, right, *zero_points], np.int32, shape)
    return builder.value(acc, term.low, term.high)


def _with_bias(site: Site, acc: Value, product: Product) -> tuple[Value, Step]:
    """Per channel, a bias goes into the requantisation; any other is added to the sums."""
    found, bias = product.step, _bias(site)
    if bias is None:
        return acc, found
    addend = np.rint(bias.astype(np.float64) / product.units)
    check_bias(addend, 8 if len(product.terms) == 1 else 16)
    integers, shape = addend.astype(np.int64), site.node.outputs[0].shape
    if integers.size == len(found.bias) and shape is not None and bias.ndim <= len(shape):
        return acc, replace(found, bias=integers.reshape(-1))
    low, high = found.low + integers.min(), found.high + integers.max()
    return acc + integers, replace(found, low=low, high=high)


def _bias(site: Site) -> npt.NDArray[Any] | None:
    """What is added to the product: by an Add behind MatMul, or Gemm's third input."""
    if site.node.op == "MatMul" or not has_input(site.node, 2):
        return site.bias
    values = site.values(2)
    if values is None:
        raise CannotLowerError("its third input is computed at run time")
    return np.asarray(values * site.node.attrs.get("beta", 1.0))
