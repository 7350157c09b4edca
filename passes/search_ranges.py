"""Scales the ranges of activations so that the products that read them change the least, on data.

Before: ranges from a tensor's own values.   After: ranges from the outputs of what reads it.
Condition: a tensor that `insert_qdq` will quantize and that a product with a constant weight reads.
Errors of several readers count relative to their outputs.
Law: on the patches drawn, no tensor's error grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.grid import Grid, affine, symmetric
from onnx_intq.patches import patches, reason_against, rows
from onnx_intq.placement import WEIGHTED, origin, plan
from onnx_intq.segments import Segments
from onnx_intq.transform import Context, Pass, PassError, Range

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

Reader = tuple[str, gs.Node, int]
"""The tensor whose range counts, a product that reads its values, which input is the weight."""
FACTORS = tuple(float(f) for f in 2.0 ** (np.arange(-4, 5) / 4))
"""What ranges are tried as multiples of."""
POSITIONS, VALUES = 64, 1 << 18
"""Positions drawn from every batch, unless they hold more values than this."""


@dataclass(frozen=True, kw_only=True)
class SearchRanges(Pass):
    """Choose ranges by the products that read them.

    Attributes:
        target: "ort" or "tensorrt": whose grids to search for.
        bits: 8 or 16.
        keep: Glob patterns of nodes that stay float.
    """

    target: str = "ort"
    bits: int = 8
    keep: tuple[str, ...] = ()

    needs: ClassVar[frozenset[str]] = frozenset({"calibrated", "data"})
    exact: ClassVar[bool] = True

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Search; return how many ranges changed. The model stays as it is."""
        if self.bits not in {8, 16}:
            raise PassError(f"{self.bits}-bit activations; expected 8 or 16")
        readers = self._readers(model, ctx)
        errors = {name: np.zeros(len(FACTORS)) for name, _, _ in readers}
        by_input: dict[str, list[Reader]] = {}
        for reader in readers:
            by_input.setdefault(reader[1].inputs[1 - reader[2]].name, []).append(reader)
        segments = Segments(model, by_input)
        for seed, batch in enumerate(ctx.feeds):
            for tensor, values in segments.run(batch):
                for name, node, index in by_input[tensor]:
                    errors[name] += self._errors(node, index, values, ctx.ranges[name], seed)
        best = {name: FACTORS[int(np.argmin(found))] for name, found in errors.items()}
        ctx.ranges = {n: _scaled(r, best.get(n, 1.0)) for n, r in ctx.ranges.items()}
        return sum(factor != 1.0 for factor in best.values())

    def _readers(self, model: gs.Graph, ctx: Context) -> list[Reader]:
        """The products with constant weights that will read quantized activations."""
        chosen = plan(model, self.target, self.keep)
        found = list[Reader]()
        for node in chosen.nodes:
            index = next((i for i in (1, 0) if isinstance(node.inputs[i], gs.Constant)), None)
            if node.op not in WEIGHTED or index is None:
                continue
            if why := reason_against(node, node.inputs[index].values):
                ctx.skip(node, why)
                continue
            first = [t for t in origin(node.inputs[1 - index]) if t.name in chosen.tensors][-1]
            if first.name in ctx.ranges:  # else `insert_qdq` says what is missing
                found.append((first.name, node, index))
        return found

    def _errors(
        self, node: gs.Node, index: int, values: Array, limits: Range, seed: int
    ) -> Float64:
        """Squared errors of a product's outputs relative to these, for every factor."""
        weight = node.inputs[index].values
        w = np.swapaxes(rows(node, index, weight), 1, 2)
        most = min(max(VALUES // (w.shape[0] * w.shape[1]), 4), POSITIONS)
        x = patches(node, index, weight.shape[2:], values, most, seed)
        power = float(np.square(x @ w).sum()) or 1.0
        low, high = limits
        return np.array(
            [np.square((self._moved(x, low * f, high * f) - x) @ w).sum() / power for f in FACTORS]
        )

    def _moved(self, x: Array, low: float, high: float) -> Array:
        """`x`, quantized and dequantized."""
        signed = self.target == "tensorrt"
        grid = Grid(self.bits, signed=signed)
        scale, zero = (symmetric if signed else affine)(low, high, grid)
        q = np.rint(x / scale)
        np.clip(q, grid.low - zero, grid.high - zero, out=q)
        q *= scale
        return q


def _scaled(limits: Range, factor: float) -> Range:
    return limits[0] * factor, limits[1] * factor
