"""Stores packed constants as they are: for runtimes without the operators that decode them.

Before: `y = f(x, Gather(table, Cast(...)))`.   After: `y = f(x, w)`, w an int8 constant.
Condition: the index is decoded from constants by the operators that `pack_weights` puts in.
It is the inverse of that pass, but for the opset, which stays.
Law: outputs do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnx_intq.packing import unpack
from onnx_intq.transform import Context, Pass


@dataclass(frozen=True, kw_only=True)
class UnpackWeights(Pass):
    """Decode packed constants."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Decode; return how many."""
        return unpack(model)
