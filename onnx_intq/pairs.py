"""Appends QuantizeLinear/DequantizeLinear pairs to tensors, and stores what they quantize."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq import qdq
from onnx_intq.graph import Names, constant, remove
from onnx_intq.grid import quantize
from onnx_intq.lowering import GRIDS
from onnx_intq.qdq import DEQUANTIZE, QUANTIZE


def append_pair(
    model: gs.Graph,
    tensor: gs.Tensor,
    scale: npt.ArrayLike,
    zero_point: int,
    dtype: npt.DTypeLike,
    names: Names,
) -> tuple[gs.Node, gs.Node]:
    """Quantize `tensor` and dequantize it again; nobody reads the result yet.

    Args:
        model: Takes the nodes.
        tensor: Float.
        scale: Real units per step.
        zero_point: The integer of real 0.
        dtype: Of the integers.
        names: In use; takes the new ones.

    Returns:
        The QuantizeLinear and the DequantizeLinear.
    """
    name, shape = tensor.name, tensor.shape
    parameters = [
        gs.Constant(names.new(f"{name}_scale"), np.asarray(scale, np.float32)),
        gs.Constant(names.new(f"{name}_zp"), np.asarray(zero_point, dtype)),
    ]
    q = gs.Variable(names.new(f"{name}_q"), dtype=np.dtype(dtype), shape=shape)
    dq = gs.Variable(names.new(f"{name}_dq"), dtype=np.float32, shape=shape)
    quantizer = gs.Node(QUANTIZE, q.name, {}, [tensor, *parameters], [q])
    dequantizer = gs.Node(DEQUANTIZE, dq.name, {}, [q, *parameters], [dq])
    model.nodes += [quantizer, dequantizer]
    return quantizer, dequantizer


def let_read(readers: list[gs.Node], old: gs.Tensor, new: gs.Tensor) -> None:
    """Let `readers` read `new` wherever they read `old`."""
    for reader in readers:
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[index] = new


def store_constants(model: gs.Graph) -> None:
    """Store constants that a QuantizeLinear quantizes at run time as the integers they become."""
    gone = []
    for node in quantizers(model):
        values, scale = constant(node, 0), qdq.scale(node)
        zero_point, dtype = qdq.zero_point(node), qdq.integer_type(node)
        flat = zero_point is None or len(np.unique(zero_point)) == 1
        flat = flat and not node.attrs.get("block_size", 0)
        if values is None or scale is None or dtype not in GRIDS or not flat:
            continue
        zero = 0 if zero_point is None else int(zero_point.flat[0])
        axis = node.attrs.get("axis", 1) % max(values.ndim, 1)
        shape = [-1 if i == axis else 1 for i in range(values.ndim)] if scale.size > 1 else ()
        # Divided in float32, as QuantizeLinear does it.
        integers = quantize(values / scale.reshape(shape), 1.0, zero, GRIDS[dtype])
        (output,) = node.outputs
        gone.append((node, output, integers))
    for node, output, integers in gone:
        remove(model, [node])
        output.to_constant(integers)


def quantizers(model: gs.Graph) -> list[gs.Node]:
    """The QuantizeLinear nodes of the graph itself; in bodies, nothing is lowered."""
    return [node for node in model.nodes if node.op == qdq.QUANTIZE]
