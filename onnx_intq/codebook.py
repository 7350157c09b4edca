"""Weights as indices into a few int8 centroids that a layer shares, and a scale per channel.

A codebook of b bits has at most 2^b centroids; which ones is found without training: `lloyd`. Its
uniform kind is the grid of `grid.weight_grid`. General Quantizer (arXiv 2210.09188) trains them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.cost import BITS_KEY
from onnx_intq.graph import Names, metadata
from onnx_intq.grid import dequantize, quantize, weight_grid, weight_scales
from onnx_intq.lloyd import Fit, fit, fit_mu_law
from onnx_intq.transform import IntqError
from onnx_intq.weight_sites import Site as Site
from onnx_intq.weight_sites import channel_axis as channel_axis
from onnx_intq.weight_sites import quantizable_weights as quantizable_weights

KINDS = ("lloyd", "mu-law", "uniform")
"""How centroids are placed: where the error is least, by a mu-law curve, or evenly."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CodedWeight:
    """A weight on the centroids of a codebook: real = stored * scale.

    Attributes:
        stored: int8, the weight's shape; at most 2^bits distinct values.
        scales: float32, [channels], or [] where `axis` is None.
        axis: Of the channels.
        bits: 1..8.
    """

    stored: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    axis: int | None
    bits: int

    def dequantized(self) -> npt.NDArray[np.float32]:
        """The real weights, as DequantizeLinear computes them."""
        return dequantize(self.stored, self.scales, 0, self.axis)

    @property
    def centroids(self) -> npt.NDArray[np.int8]:
        """The distinct integers, ascending."""
        found: npt.NDArray[np.int8] = np.unique(self.stored)
        return found


def code(
    weight: npt.NDArray[Any],
    axis: int | None,
    bits: int,
    kind: str = "lloyd",
    importance: npt.NDArray[Any] | None = None,
) -> CodedWeight:
    """Code a weight without training.

    Args:
        weight: float32, any shape.
        axis: Of the output channels, one scale each; None for one scale.
        bits: 1..8. Of 8 bits, all kinds are uniform.
        kind: One of `KINDS`.
        importance: Factors of the squared errors, >= 0; broadcasts to `weight`. None for 1.

    Raises:
        IntqError: Bad bits or kind, or the weight holds NaN or infinity.
    """
    if bits not in range(1, 9):
        raise IntqError(f"{bits}-bit weights; expected 1..8; change --bits")
    if kind not in KINDS:
        raise IntqError(f"codebook {kind!r}; expected one of: {', '.join(KINDS)}")
    if not np.isfinite(weight).all():
        raise IntqError("a weight holds NaN or infinity; expected finite values; export it again")
    if bits > 1 and (kind == "uniform" or bits == 8):
        scales = weight_scales(weight, axis, bits)
        stored = quantize(weight, scales, 0, weight_grid(bits), axis).astype(np.int8)
        return CodedWeight(stored=stored, scales=scales, axis=axis, bits=bits)
    rows = _rows(weight, axis)
    factors = np.ones_like(rows) if importance is None else _factors(importance, weight, axis)
    found = fit_mu_law(rows, factors, bits) if kind == "mu-law" else fit(rows, factors, bits)
    return _coded(found, weight, axis, bits)


def insert_coded(graph: gs.Graph, weight: gs.Constant, coded: CodedWeight) -> None:
    """Let all readers of a weight read the DequantizeLinear of its coded form.

    Args:
        graph: Of the weight; records the bits in its metadata where they are fewer than 8.
        weight: Loses its readers.
        coded: Its values.
    """
    names = Names(graph)
    stored = gs.Constant(names.new(f"{weight.name}_q"), coded.stored)
    scales = gs.Constant(names.new(f"{weight.name}_scale"), coded.scales)
    real = gs.Variable(names.new(f"{weight.name}_dq"), np.float32, coded.stored.shape)
    for node in list(weight.outputs):
        node.inputs = [real if t is weight else t for t in node.inputs]
    attrs = {} if coded.axis is None else {"axis": coded.axis}
    # A zero point of 0 is what is meant without one: of 8 bits, one would cost as much as a row.
    graph.nodes.insert(0, gs.Node("DequantizeLinear", real.name, attrs, [stored, scales], [real]))
    if coded.bits < 8:
        record_bits(graph, {stored.name: coded.bits})


def record_bits(graph: gs.Graph, widths: dict[str, int]) -> None:
    """Note in the metadata of how many bits the codebooks or grids of constants are."""
    known: dict[str, int] = json.loads(metadata(graph).get(BITS_KEY, "{}"))
    metadata(graph)[BITS_KEY] = json.dumps(known | widths, sort_keys=True)


def _rows(weight: npt.NDArray[Any], axis: int | None) -> npt.NDArray[np.float32]:
    """[channels, values of one channel]."""
    if axis is None:
        return np.reshape(weight, (1, -1)).astype(np.float32)
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float32)


def _factors(
    importance: npt.NDArray[Any], weight: npt.NDArray[Any], axis: int | None
) -> npt.NDArray[np.float32]:
    return _rows(np.broadcast_to(importance, weight.shape), axis)


def _coded(found: Fit, weight: npt.NDArray[Any], axis: int | None, bits: int) -> CodedWeight:
    if axis is None:
        stored, scales = found.stored.reshape(weight.shape), found.scales.reshape(())
    else:
        moved = np.moveaxis(weight, axis, 0).shape
        stored, scales = np.moveaxis(found.stored.reshape(moved), 0, axis), found.scales
    return CodedWeight(stored=np.ascontiguousarray(stored), scales=scales, axis=axis, bits=bits)
