"""Stores weights as int8 centroids of a codebook, one scale per output channel; the rest is float.

Before: `y = Conv(x, w)`, w float32.
After: `y = Conv(x, DequantizeLinear(int8 constant, scales, axis))`, of at most 2^bits integers.
Weights of convolutions, products, recurrent layers and tables behind Gather, wherever they are read
from the outermost graph. The bits go into the metadata under `onnx_intq.bits`.
Condition: it makes the file smaller once packed.
Law: under equal factors, the squared error is at most that of the uniform grid of as many bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.codebook import KINDS, Site, code, insert_coded, quantizable_weights
from onnx_intq.transform import Context, Pass, PassError


@dataclass(frozen=True, kw_only=True)
class QuantizeCodebook(Pass):
    """Quantize weights alone.

    Attributes:
        bits: Of an index into the codebook, 1..8.
        kind: How centroids are placed: "lloyd", "mu-law" or "uniform".
        keep: Glob patterns of nodes whose weights stay float.
        overrides: (glob pattern of node names, bits) pairs; the last that matches wins. Of a weight
            that several nodes read, the most bits.
    """

    bits: int = 8
    kind: str = "lloyd"
    keep: tuple[str, ...] = ()
    overrides: tuple[tuple[str, int], ...] = ()

    gives: ClassVar[frozenset[str]] = frozenset({"quantized"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Quantize; return how many weights were."""
        self._check()
        chosen = list(self._chosen(model, ctx))
        for site, bits in chosen:
            if not np.isfinite(site.constant.values).all():
                raise PassError(
                    f"weight {site.name!r} holds NaN or infinity; expected finite values"
                )
            coded = code(site.constant.values, site.axis, bits, self.kind)
            insert_coded(model, site.constant, coded)
        return len(chosen)

    def _check(self) -> None:
        for bits in (self.bits, *(b for _, b in self.overrides)):
            if bits not in range(1, 9):
                raise PassError(f"{bits}-bit weights; expected 1..8")
        if self.kind not in KINDS:
            raise PassError(f"codebook {self.kind!r}; expected one of: {', '.join(KINDS)}")

    def _chosen(self, model: gs.Graph, ctx: Context) -> Iterator[tuple[Site, int]]:
        known = {node.name: node for node in model.nodes}
        for site in quantizable_weights(model):
            bits = max(self._bits(name) for name in site.nodes)
            if any(fnmatchcase(name, pattern) for name in site.nodes for pattern in self.keep):
                ctx.skip(known[site.nodes[0]], "its weight is to stay float")
            elif not _pays(site, bits):
                ctx.skip(known[site.nodes[0]], "its weight has too few values per scale")
            else:
                yield site, bits

    def _bits(self, name: str) -> int:
        matching = [bits for pattern, bits in self.overrides if fnmatchcase(name, pattern)]
        return matching[-1] if matching else self.bits


def _pays(site: Site, bits: int) -> bool:
    """Whether indices and scales take less than the float values."""
    values = site.constant.values
    channels = 1 if site.axis is None else values.shape[site.axis]
    return bool(values.size * bits / 8 + 4 * channels < 4 * values.size)
