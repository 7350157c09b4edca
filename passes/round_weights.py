"""Rounds stored weights up or down so that each layer's outputs change the least, on data.

Before: integers nearest to the float weights.   After: the neighbours on either side, on the grid
or in the codebook.
Condition: a product whose weight is stored by `quantize_weights` or `quantize_codebook`.
Scales stay. Layers are taken in order, their inputs those of the quantized model so far.
Law: under the inputs' second moment, damped, no output channel's squared error grows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.moments import moments
from onnx_intq.reference import sequential
from onnx_intq.rounding import round_rows
from onnx_intq.stored_weights import StoredWeight, require_reference, roundable
from onnx_intq.transform import Context, Pass

Float32 = npt.NDArray[np.float32]
Blocks = Iterable[tuple[slice, Float32, Float32]]


@dataclass(frozen=True, kw_only=True)
class RoundWeights(Pass):
    """Round weights by their layers' outputs.

    Attributes:
        compensate: Aim at the outputs for the float model's inputs, so that roundings also make up
            for what earlier layers have changed. Pays where that is much: at 4 bits.
        damping: Added to the diagonal of the inputs' second moment, relative to its mean: the more,
            the less the roundings follow the data.
    """

    compensate: bool = False
    damping: float = 0.01

    needs: ClassVar[frozenset[str]] = frozenset({"quantized", "reference", "data"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Round; return how many weights changed in at least one value."""
        weights = {id(w.layer): w for w in roundable(model, ctx)}
        chosen, changed = [w.layer for w in weights.values()], 0
        reference = require_reference(ctx)
        for layer, x, quantized in sequential(model, reference, chosen, ctx.feeds):
            weight = weights[id(layer)]
            blocks = moments(layer.node, layer.index, layer.float_weight, x, quantized)
            changed += weight.store(self._rounded(weight, blocks))
        return changed

    def _rounded(self, weight: StoredWeight, blocks: Blocks) -> Float32:
        """The integers, chunk by chunk; moments as `moments` gives them."""
        found = weight.integers
        for chunk, own, across in blocks:
            target, start = weight.target[..., chunk], found[..., chunk]
            bounds = weight.bounds(chunk)
            damping = _diagonal(own, self.damping)
            moment = own + damping
            if self.compensate:
                target = _solve(moment, target @ (across + damping))
            found[..., chunk] = round_rows(target, start, moment, bounds, weight.levels)
        return found


def _diagonal(moment: Float32, damping: float) -> Float32:
    """A multiple of the unit matrix for every group; not 0 where all inputs are."""
    size = np.einsum("gkk->gk", moment).mean(axis=1) * damping
    added = np.maximum(size, np.finfo(np.float32).tiny)[:, None, None]
    return np.asarray(added * np.eye(moment.shape[-1]), np.float32)


def _solve(moment: Float32, products: Float32) -> Float32:
    """The rows w with w @ moment = products; the moment is symmetric."""
    return np.swapaxes(np.linalg.solve(moment, np.swapaxes(products, 1, 2)), 1, 2)
