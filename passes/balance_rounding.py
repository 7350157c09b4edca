"""Rounds stored weights up or down so that their errors cancel, without data (SQuant).

Before: integers nearest to the float weights.   After: some of them the neighbours on the other
side, so that errors sum up to next to nothing within kernels and output channels.
Condition: a product that reads dequantized activations, its weight stored by `quantize_weights`.
Scales stay.
Law: an output channel's errors sum up to half a step at most, unless its range cuts weights off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnx_intq.balance import balance_rows
from onnx_intq.stored_weights import roundable
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class BalanceRounding(Pass):
    """Let rounding errors cancel."""

    needs: ClassVar[frozenset[str]] = frozenset({"quantized", "reference"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Round; return how many weights changed in at least one value."""
        changed = 0
        for weight in roundable(model, ctx):
            if weight.levels is not None:
                ctx.skip(weight.layer.node, "its weight lies on a codebook, not on a grid")
                continue
            target = weight.target
            kernels = target.reshape(-1, weight.kernels, target.shape[-1] // weight.kernels)
            start = weight.integers.reshape(kernels.shape)
            changed += weight.store(balance_rows(kernels, start, weight.top).reshape(target.shape))
        return changed
