"""A product's input as rows that its weight multiplies, and its weight as such rows.

Every output of a convolution or matrix product is the scalar product of one row of the weight with
one patch of the input. Groups of channels have their own rows and patches.
Law: patches x rows, summed over the last axis, are the product's results at those positions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

Array = npt.NDArray[Any]


def reason_against(node: gs.Node, weight: Array) -> str:
    """Why a product has no such rows, "" if it has.

    Args:
        node: Conv, ConvTranspose, Gemm or MatMul.
        weight: Its values.
    """
    if node.op == "ConvTranspose":
        return "its outputs overlap, so that they are no scalar products with one row each"
    if node.op == "Conv":
        padded = node.attrs.get("auto_pad", "NOTSET") != "NOTSET"
        return "its padding depends on the input's size (auto_pad)" if padded else ""
    return "" if weight.ndim == 2 else "its weight is no matrix"


def rows(node: gs.Node, index: int, weight: Array) -> Array:
    """The weight's rows: [groups, outputs, taps], a view where possible."""
    if node.op == "Conv":
        return weight.reshape(node.attrs.get("group", 1), -1, math.prod(weight.shape[1:]))
    return (weight.T if _is_transposed(node, index) else weight)[None]


def weight_of(node: gs.Node, index: int, found: Array, shape: tuple[int, ...]) -> Array:
    """The weight of which `found` are the rows; the inverse of `rows`."""
    if node.op == "Conv":
        return found.reshape(shape)
    return np.ascontiguousarray(found[0].T if _is_transposed(node, index) else found[0])


def patches(
    node: gs.Node, index: int, kernel: tuple[int, ...], x: Array, most: int, seed: int
) -> Array:
    """What the weight's rows are multiplied with, at `most` positions drawn at random.

    Args:
        node: See `reason_against`.
        index: Which input is the weight.
        kernel: The weight's spatial shape, () for matrices.
        x: The other input.
        most: Positions to draw, over samples and time; all where there are no more.
        seed: Of the draw: inputs of one shape give the same positions.

    Returns:
        The type of `x`, [groups, positions, taps].
    """
    if node.op == "Conv":
        return _windows(node, kernel, x, most, seed)
    if index == 0:
        x = np.moveaxis(x, -2, -1)
    elif node.op == "Gemm" and node.attrs.get("transA", 0):
        x = x.T
    flat = x.reshape(-1, x.shape[-1])
    return flat[_draw(len(flat), most, seed)][None]


def _windows(node: gs.Node, kernel: tuple[int, ...], x: Array, most: int, seed: int) -> Array:
    rank, attrs = len(kernel), node.attrs
    pads = attrs.get("pads", [0] * 2 * rank)
    steps = attrs.get("dilations", [1] * rank)
    around = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]
    spans = [(k - 1) * step + 1 for k, step in zip(kernel, steps, strict=True)]
    axes = tuple(range(2, 2 + rank))
    view = np.lib.stride_tricks.sliding_window_view(np.pad(x, around), spans, axes)
    every = [1, 1, *attrs.get("strides", [1] * rank), *steps]
    view = view[tuple(slice(None, None, step) for step in every)]
    places = (view.shape[0], *view.shape[2 : 2 + rank])
    sample, *where = np.unravel_index(_draw(math.prod(places), most, seed), places)
    chosen: tuple[Any, ...] = (sample, slice(None), *where)
    found: Array = view[chosen]
    return found.reshape(len(found), attrs.get("group", 1), -1).transpose(1, 0, 2)


def _draw(count: int, most: int, seed: int) -> npt.NDArray[np.int64]:
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def _is_transposed(node: gs.Node, index: int) -> bool:
    """Whether a matrix is multiplied from the right: its columns are what rows are here."""
    if node.op == "Gemm":
        return not node.attrs.get("transB", 0)
    return index == 1
