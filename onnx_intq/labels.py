"""Follows channels through operators that move values, by labels.

Labels are an integer array that broadcasts to a tensor: the number of the channel each value
belongs to, FIXED for values that must keep their scale. An axis along which they do not differ has
size 1, so that the tensor's own size need not be known there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant

Labels = npt.NDArray[np.int64]
FIXED = -1
"""The label of values that keep their scale."""
HOMOGENEOUS = {"Relu", "LeakyRelu", "Identity", "Dropout", "MaxPool", "AveragePool"}
HOMOGENEOUS |= {"GlobalAveragePool", "GlobalMaxPool"}
"""f(a * x) = a * f(x) for a > 0, each channel alone."""
RESHAPING = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}


class CannotScaleError(Exception):
    """An operator stands in the way of scaling channels."""


def shape_of(tensor: gs.Tensor) -> tuple[Any, ...]:
    """A tensor's shape: numbers where known."""
    if tensor.shape is None:
        raise CannotScaleError(f"the shape of {tensor.name} is not known")
    return tuple(tensor.shape)


def vector(labels: Labels, axis: int, node: gs.Node) -> Labels:
    """The labels along `axis`, if they depend on no other."""
    axis %= labels.ndim
    if labels.size != labels.shape[axis] or labels.size == 1:
        raise CannotScaleError(f"{node.name} has its channels elsewhere")
    return labels.reshape(-1)


def align(labels: Labels, rank: int) -> Labels:
    """The labels with axes of size 1 in front, `rank` in all."""
    if labels.ndim > rank:
        raise CannotScaleError("a result of fewer axes")
    return labels.reshape(*[1] * (rank - labels.ndim), *labels.shape)


def operand_labels(labels: Labels, shape: tuple[Any, ...]) -> Labels:
    """The labels of an operand that must have the labelled axes in full."""
    extra = labels.ndim - len(shape)
    if any(size > 1 for size in labels.shape[: max(extra, 0)]):
        raise CannotScaleError("an operand is broadcast along the channels")
    own = labels.reshape(labels.shape[extra:]) if extra > 0 else align(labels, len(shape))
    if any(n > 1 and n != size for n, size in zip(own.shape, shape, strict=True)):
        raise CannotScaleError("an operand is broadcast along the channels")
    return own


def labels_before(node: gs.Node, result: gs.Tensor, labels: Labels) -> Labels:
    """Labels of the first input of an operator that passes them on, from those of a result."""
    if node.op == "Transpose":
        return np.transpose(labels, np.argsort(_permutation(node, labels.ndim)))
    if node.op in RESHAPING:
        return _reshaped(labels, shape_of(result), shape_of(node.inputs[0]))
    if node.op == "Split":
        axis = node.attrs.get("axis", 0) % labels.ndim
        if labels.shape[axis] == 1:
            return labels
        parts = []
        for other in node.outputs:
            shape = [shape_of(other)[i] if i == axis else n for i, n in enumerate(labels.shape)]
            parts.append(labels if other is result else np.full(shape, FIXED))
        return np.concatenate(parts, axis)
    _require_passing(node, labels)
    return labels


def labels_after(node: gs.Node, result: gs.Tensor, labels: Labels) -> Labels:
    """Labels of a result, from those of the first input."""
    if node.op == "Transpose":
        return np.transpose(labels, _permutation(node, labels.ndim))
    if node.op in RESHAPING:
        return _reshaped(labels, shape_of(node.inputs[0]), shape_of(result))
    if node.op == "Split":
        axis = node.attrs.get("axis", 0) % labels.ndim
        if labels.shape[axis] == 1:
            return labels
        sizes = [shape_of(t)[axis] for t in node.outputs]
        number = next(i for i, t in enumerate(node.outputs) if t is result)
        start = sum(sizes[:number])
        return np.take(labels, np.arange(start, start + sizes[number]), axis)
    _require_passing(node, labels)
    return labels


def _require_passing(node: gs.Node, labels: Labels) -> None:
    spatial = any(size > 1 for size in labels.shape[2:])
    if node.op in HOMOGENEOUS and not ("Pool" in node.op and spatial):
        return
    if node.op == "Pad" and node.attrs.get("mode", "constant") == "constant":
        pads, value = constant(node, 1), constant(node, 2)
        if pads is not None and len(node.inputs) < 4 and (len(node.inputs) < 3 or _is_zero(value)):
            around = np.atleast_1d(pads.reshape(2, -1).any(axis=0))
            if not any(around[i] for i, size in enumerate(labels.shape) if size > 1):
                return
    raise CannotScaleError(f"{node.name} ({node.op}) cannot pass on or take in factors")


def _permutation(node: gs.Node, rank: int) -> list[int]:
    return list(node.attrs.get("perm", range(rank)[::-1]))


def _reshaped(labels: Labels, before: tuple[Any, ...], after: tuple[Any, ...]) -> Labels:
    """Labels behind a reshape: what is labelled lies in trailing axes of known sizes."""
    first = next((i for i, size in enumerate(labels.shape) if size > 1), labels.ndim)
    inner = before[first:]
    if not all(isinstance(n, int) for n in inner):
        raise CannotScaleError("a reshape of axes whose sizes are not known")
    wanted, size, start = int(np.prod(inner)), 1, len(after)
    while size < wanted and start > 0 and isinstance(after[start - 1], int):
        start -= 1
        size *= after[start]
    if size != wanted:
        raise CannotScaleError("a reshape that divides channels")
    full = np.broadcast_to(labels.reshape(labels.shape[first:]), inner).reshape(after[start:])
    for axis in range(full.ndim):
        one = np.take(full, [0], axis)
        full = one if (full == one).all() else full
    return align(full, len(after))


def _is_zero(value: npt.NDArray[Any] | None) -> bool:
    return value is not None and not value.any()
