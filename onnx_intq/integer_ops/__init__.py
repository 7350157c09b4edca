"""ONNX operators on integers as NumPy functions, called as `onnx_intq.binding` describes.

Bit for bit those of onnxruntime wherever its result is defined. Floating-point tensors pass through
operators that only move elements, and through those at the border of an integer-only graph.
"""

from onnx_intq.integer_ops import (
    arithmetic,
    cast,
    conv,
    indexing,
    layout,
    logic,
    pool,
    products,
    quantize,
    reduce,
)
from onnx_intq.integer_ops.arrays import Function

OPS: dict[str, Function] = {
    **arithmetic.OPS,
    **cast.OPS,
    **conv.OPS,
    **indexing.OPS,
    **layout.OPS,
    **logic.OPS,
    **pool.OPS,
    **products.OPS,
    **quantize.OPS,
    **reduce.OPS,
}
"""Operator of the default domain -> function; `If` and `Scan` are the interpreter's."""
