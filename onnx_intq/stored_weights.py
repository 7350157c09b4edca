"""The weights a quantized graph stores as integers, beside the float ones they stand for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.cost import BITS_KEY
from onnx_intq.graph import metadata
from onnx_intq.grid import weight_grid
from onnx_intq.patches import reason_against, rows, weight_of
from onnx_intq.reference import Layer, layers
from onnx_intq.transform import Context, PassError

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredWeight:
    """A weight whose rounding may be changed; rows are those of `patches.rows`.

    Attributes:
        layer: The product that reads it.
        target: The float weight in steps of its grid, [groups, outputs, taps].
        top: The grid is -top .. top.
        levels: The integers of a codebook, ascending; None on a grid, where there are all.
    """

    layer: Layer
    target: Float32
    top: int
    levels: Float32 | None = None

    @property
    def integers(self) -> Float32:
        """What is stored now, the shape of `target`."""
        return rows(self.layer.node, self.layer.index, self.layer.stored.values).astype(np.float32)

    @property
    def kernels(self) -> int:
        """Of how many kernels, one per input channel, a row consists."""
        return int(self.target.shape[-1] // math.prod(self.layer.float_weight.shape[2:]))

    def bounds(self, chunk: slice) -> Float32:
        """The allowed integers on either side of the target, for some taps: [2, *target.shape]."""
        target = self.target[..., chunk]
        if self.levels is None:
            return np.stack([np.floor(target), np.ceil(target)]).clip(-self.top, self.top)
        above = np.searchsorted(self.levels, target)
        sides = np.stack([above - (self.levels.take(above, mode="clip") != target), above])
        return self.levels.take(sides, mode="clip")

    def store(self, integers: Float32) -> bool:
        """Store other integers, the shape of `target`; return whether any differs."""
        old = self.layer.stored.values
        new = weight_of(self.layer.node, self.layer.index, integers, old.shape).astype(old.dtype)
        self.layer.stored.values = new
        return bool((new != old).any())


def roundable(model: gs.Graph, ctx: Context) -> list[StoredWeight]:
    """The weights of `model` that belong to a product of the reference, each once, in order.

    Others are left out with the reason.

    Raises:
        PassError: The context holds no float model.
    """
    reference = require_reference(ctx)
    widths: dict[str, int] = json.loads(metadata(model).get(BITS_KEY, "{}"))
    found, seen = list[StoredWeight](), set[int]()
    for layer in layers(model, reference):
        why = reason_against(layer.node, layer.float_weight)
        if id(layer.stored) in seen:
            why = "shares its weight with a node before"
        if (layer.name, layer.index) in ctx.coded:
            why = "has a weight that came quantized, and stays as it is"
        seen.add(id(layer.stored))
        if why:
            ctx.skip(layer.node, why)
        else:
            top = weight_grid(widths.get(layer.stored.name, 8)).high
            levels = codebook(layer.stored.values, top)
            found.append(StoredWeight(layer=layer, target=_in_steps(layer), top=top, levels=levels))
    return found


def codebook(stored: npt.NDArray[Any], top: int) -> Float32 | None:
    """The distinct integers, ascending, of a constant that does not lie on -top .. top, else None.

    Codebooks use all of int8, whatever their bits.
    """
    found = np.unique(stored).astype(np.float32)
    return found if np.abs(found).max(initial=0) > top else None


def require_reference(ctx: Context) -> gs.Graph:
    """The float model.

    Raises:
        PassError: The context holds none.
    """
    if ctx.reference is None:
        raise PassError("no float model is at hand; expected one; give --data in this run")
    return ctx.reference


def _in_steps(layer: Layer) -> Float32:
    scales, axis = layer.quantized_weight.scales, layer.quantized_weight.axis
    shape = [-1 if i == axis else 1 for i in range(layer.float_weight.ndim)]
    steps = layer.float_weight / (scales.reshape(shape) if scales.size > 1 else scales)
    return rows(layer.node, layer.index, steps.astype(np.float32))
