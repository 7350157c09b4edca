"""ONNX operators as torch functions: attributes are keyword arguments, under their ONNX names.

A parameter annotated `int`, `float`, `bool` or a list of them receives Python values, read from the
attribute or, in newer opsets, from the input of that place; any other parameter receives a tensor.
`opset` and `outputs` (how many the node has) are filled in for a function that asks for them. A
trailing underscore is no part of a name.
"""

from collections.abc import Callable

from torch import Tensor

from onnx_intq.torch_ops import (
    conv,
    elementwise,
    indexing,
    layout,
    norm,
    pool,
    quantize,
    recurrent,
    reduce,
    resize,
)

OPS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    **conv.OPS,
    **elementwise.OPS,
    **indexing.OPS,
    **layout.OPS,
    **norm.OPS,
    **pool.OPS,
    **quantize.OPS,
    **recurrent.OPS,
    **reduce.OPS,
    **resize.OPS,
}
"""Operator of the default domain -> function; `If` and `Loop` are `torch_graph`'s own."""
