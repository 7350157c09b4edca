"""Scales channels so that products lose less when quantized, and takes the factors back elsewhere.

Before: `y = W2 f(W1 x)`, f a ReLU, a LayerNormalization before W2, a softmax's values, a reshape.
After: `y = (W2 / s) f((s * W1) x)`, s one factor per channel, chosen for the least error of the
quantized products on the data (`onnx_intq.smoothing`); queries times s, keys over s.
Condition: the channels can be followed (`onnx_intq.channels`), and factors lower the error on
samples that were not used to choose them. Runs before calibration: it moves ranges.
Law: outputs do not change but for float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnx_intq.channels import Group, groups
from onnx_intq.graph import Names
from onnx_intq.grid import Grid
from onnx_intq.placement import QUANTIZABLE
from onnx_intq.smoothing import Grids, choose, collect
from onnx_intq.transform import Context, Pass, PassError


@dataclass(frozen=True, kw_only=True)
class Equalize(Pass):
    """Equalize channels.

    Attributes:
        bits: Of the weights that are to come, 2..8.
        target: "ort", "integer" or "tensorrt": whose activation grid to measure on.
        shift: How far channels may reach beyond what the data shows, see `smoothing.Grids`.
    """

    bits: int = 8
    target: str = "ort"
    shift: float = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"bn-folded", "data"})

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Scale; return how many groups of channels were scaled."""
        if self.bits not in range(2, 9) or self.target not in QUANTIZABLE:
            targets = ", ".join(QUANTIZABLE)
            raise PassError(
                f"bits {self.bits}, target {self.target!r}; expected 2..8, and one of: {targets}"
            )
        if ctx.coded:
            raise PassError(
                "the model's weights are integers already, which factors would change; expected "
                "float ones; leave the pass out, or start from the float model"
            )
        found: list[tuple[gs.Node, Group]] = []
        for node, group in groups(model):
            if isinstance(group, str):
                ctx.skip(node, f"its input cannot be equalized: {group}")
            else:
                found.append((node, group))
        if not found:
            return 0
        samples = collect(model, [group for _, group in found], ctx.feeds)
        activation = Grid(8, signed=self.target == "tensorrt")
        grids = Grids(activation=activation, weight_bits=self.bits, shift=self.shift)
        names, count = Names(model), 0
        for node, group in found:
            factors, _ = choose(group, samples, grids)
            if factors is None:
                ctx.skip(node, "no factors lower its error")
                continue
            group.scale(factors, names)
            count += 1
        return count
