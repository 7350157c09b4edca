"""Chooses every activation's grid, range and width, by what rounding costs the network's result.

Before: a range per tensor, from calibration, and 8 bits for all.
After: the same graph; `insert_qdq`, which stands behind, finds other ranges and widths.
Of all ranges calibration found for a tensor, that is taken which keeps the result best. Where 8
bits are too few with any, target integer gets 16, and runs the product as two of 8 bits; for
onnxruntime and TensorRT, which have no faster 16-bit products, what reads the tensor stays float.
Condition: feeds and ranges (facts "data", "calibrated"); `onnx_intq.sensitivity` measures.
Law: all that is left to 8 bits leaves, to first order, at least `limit` dB of the result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.composites import attention
from onnx_intq.graph import metadata
from onnx_intq.grid import Grid
from onnx_intq.lowering import fused
from onnx_intq.placement import Plan, activations, plan
from onnx_intq.sensitivity import ByRow, OnGrid, Rounding, noise_to_signal
from onnx_intq.transform import Context, IntqError, Pass, PassError, Range

WIDE_KEY = "onnx_intq.wide"
"""Metadata key of a JSON object: tensor that needs 16 bits -> SQNR that 8 would leave, dB."""
SILENCE = 1e-20
"""Noise to signal below which nothing is lost: 200 dB."""


@dataclass(frozen=True, kw_only=True)
class ChooseGrids(Pass):
    """Choose the ranges, and between 8 and 16 bits.

    Attributes:
        target: "ort", "tensorrt" or "integer".
        limit: SQNR of the result, in dB, that all roundings to 8 bits together have to leave; the
            costliest are given up until they do. 0: all tensors get 8 bits.
        samples: Inputs to measure on.
        keep: Glob patterns of nodes that stay float anyway.
        tables: For target "integer": functions will be tables, of 8-bit arguments.
    """

    target: str = "ort"
    limit: float = 25.0
    samples: int = 8
    keep: tuple[str, ...] = ()
    tables: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"bn-folded", "data", "calibrated"})

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Measure; return how many tensors got another range or width."""
        if self.samples < 1:
            raise PassError(f"{self.samples} samples; expected at least one")
        chosen = plan(model, self.target, self.keep, tables=self.tables)
        ranges = _candidates(chosen, ctx)
        roundings = self._roundings(chosen, ranges)
        try:
            noise = noise_to_signal(model, ctx.feeds, roundings, samples=self.samples)
        except IntqError as error:
            if self.limit:  # asked for; else a model torch cannot run keeps calibration's ranges
                raise
            ctx.skipped.append((self.name, f"ranges stay as calibration chose them: {error}"))
            return 0
        best = {name: int(np.argmin(found)) for name, found in noise.items()}
        taken = {name: ranges[name][index] for name, index in best.items()}
        changed = {name for name, found in taken.items() if found != ctx.ranges[name]}
        ctx.ranges = {**ctx.ranges, **taken}
        wide = self._wide({name: float(noise[name][index]) for name, index in best.items()})
        metadata(model)[WIDE_KEY] = json.dumps(wide, sort_keys=True)
        if self.target == "integer":
            ctx.wide |= wide
        else:
            ctx.floats |= self._floats(model, chosen, wide)
        return len(changed | wide.keys())

    def _roundings(
        self, chosen: Plan, ranges: Mapping[str, list[Range]]
    ) -> dict[str, list[Rounding]]:
        """What 8 bits would do to each tensor, for each of its ranges."""
        grid = Grid(8, signed=self.target == "tensorrt")
        by_row = self._normalised_behind(chosen)
        return {
            name: [ByRow()] if name in by_row else [OnGrid(limits, grid) for limits in found]
            for name, found in ranges.items()
        }

    def _normalised_behind(self, chosen: Plan) -> set[str]:
        """Probabilities that target integer normalises behind the product which reads them."""
        if self.target != "integer":
            return set()
        found = (attention(node) for node in chosen.nodes if node.op == "MatMul")
        return {softmax.outputs[0].name for softmax in found if softmax is not None}

    def _wide(self, noise: Mapping[str, float]) -> dict[str, float]:
        """The costliest tensors, until the others keep to the limit; with what 8 bits leave, dB."""
        budget, total = 10 ** (-self.limit / 10), sum(noise.values())
        wide: dict[str, float] = {}
        for name, power in sorted(noise.items(), key=lambda item: -item[1]):
            if not self.limit or total <= budget:
                break
            total -= power
            wide[name] = round(-10 * float(np.log10(max(power, SILENCE))), 1)
        return wide

    def _floats(self, model: gs.Graph, chosen: Plan, wide: Mapping[str, float]) -> dict[str, str]:
        """The nodes that read or make the tensors, with the reason."""
        found: dict[str, str] = {}
        for node in chosen.nodes:
            read = [t for t in activations(node) if t.name in chosen.tensors]
            touched = {chosen.first(t).name for t in read} | self._made(model, node, chosen)
            for name in sorted(touched & wide.keys()):
                why = f"8 bits for {name!r} alone would leave {wide[name]} dB of the result"
                found.setdefault(node.name, f"{why}; all together are to leave {self.limit:g}")
        return found

    def _made(self, model: gs.Graph, node: gs.Node, chosen: Plan) -> set[str]:
        """The result that a node cannot give in float: that of a Conv in onnxruntime."""
        if self.target == "tensorrt" or node.op == "MatMul":
            return set()
        result = fused(model, node)[-1].outputs[0]
        return {chosen.first(result).name} if result.name in chosen.tensors else set()


def _candidates(chosen: Plan, ctx: Context) -> dict[str, list[Range]]:
    """The ranges of each planned tensor that is not just another's, moved; the present one first.

    Moved tensors take the range of what they hold.
    """
    firsts = {chosen.first(tensor).name for tensor in chosen.tensors.values()}
    return {
        name: list(dict.fromkeys((ctx.ranges[name], *ctx.alternatives.get(name, ()))))
        for name in chosen.tensors
        if name in firsts and name in ctx.ranges
    }
