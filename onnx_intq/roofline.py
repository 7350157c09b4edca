"""Lower bounds of a model's run time on a device, from its peak rates.

The roofline model: Williams, Waterman, Patterson, 2009.

A product takes at least the time of its multiply-accumulates at the peak rate, and at least that
of its factors and its result going once through memory; the larger is its bound, and names what
binds it. All other operators count as fused into products: nothing. The bounds of products that
run one after the other add up. Below its bound a product can only come where the cache holds what
it reads. Real kernels stay above: those of one precision more than those of another, so the ratio
of two bounds is no bound of a measured ratio. A measured time over a bound is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnx_intq.cost import Cost, NodeCost
from onnx_intq.devices import PRECISIONS, Device

FLOAT32, FLOAT16, INT8 = PRECISIONS


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A product on a device.

    Attributes:
        node: What is computed.
        precision: A key of `PRECISIONS`.
        bytes: Of the two factors and the result.
        compute: Seconds of its multiply-accumulates at the peak rate.
        memory: Seconds of its bytes at the peak bandwidth.
    """

    node: NodeCost
    precision: str
    bytes: int
    compute: float
    memory: float

    @property
    def seconds(self) -> float:
        """The bound."""
        return max(self.compute, self.memory)

    @property
    def bound(self) -> str:
        """What binds it: "compute" or "memory"."""
        return "memory" if self.memory > self.compute else "compute"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The products of a model, in graph order."""

    layers: tuple[Layer, ...]

    @property
    def seconds(self) -> float:
        """The sum of the products' bounds."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def memory_layers(self) -> float:
        """The share of products bound by memory, 0..1; 0 without products."""
        return len(self._by_memory()) / max(len(self.layers), 1)

    @property
    def memory_time(self) -> float:
        """The share of the time that goes to them, 0..1."""
        return sum(layer.seconds for layer in self._by_memory()) / (self.seconds or 1.0)

    def _by_memory(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.bound == "memory"]


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """A model's bounds on a device.

    Attributes:
        device: Whose rates were taken.
        bounds: Precision -> bounds with every product in it, for the precisions the device has.
        own: Bounds with every product in the precision it has in the model.
    """

    device: Device
    bounds: Mapping[str, Bound]
    own: Bound

    def speedup(self, bound: Bound) -> float:
        """How many times shorter than float32 `bound` is; 1 where nothing is computed."""
        return self.bounds[FLOAT32].seconds / bound.seconds if bound.seconds else 1.0


def roofline(found: Cost, device: Device) -> Roofline:
    """The bounds of a model whose cost was counted."""
    own = Bound(layers=tuple(_layer(n, device, own_precision(n, device)) for n in found.nodes))
    bounds = {kind: _bound(found.nodes, device, kind) for kind in device.tops}
    return Roofline(device=device, bounds=bounds, own=own)


def own_precision(node: NodeCost, device: Device) -> str:
    """The precision that a product with factors of so many bits is computed in.

    int8 takes both factors in 8 bits or less; 16 bits count as float16 where the device has it; an
    8-bit factor with a float one is dequantized before.
    """
    if max(node.bits) <= 8:
        return INT8
    return FLOAT16 if node.bits == (16, 16) and FLOAT16 in device.tops else FLOAT32


def _bound(nodes: Iterable[NodeCost], device: Device, precision: str) -> Bound:
    return Bound(layers=tuple(_layer(node, device, precision) for node in nodes))


def _layer(node: NodeCost, device: Device, precision: str) -> Layer:
    size = sum(node.elements) * PRECISIONS[precision]
    return Layer(
        node=node,
        precision=precision,
        bytes=size,
        compute=2 * node.macs / (device.tops[precision] * 1e12),
        memory=size / (device.gigabytes * 1e9),
    )
