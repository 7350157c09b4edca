"""A network that is trained in its ONNX form: one graph, or several that work together.

The graphs are run by torch with other weights in place of their own, so one copy of the network is
both the float teacher and the student.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs
import torch
from torch import Tensor, nn

from onnx_intq.codebook import Site, quantizable_weights
from onnx_intq.torch_graph import TorchGraph, parameter_name

BIASES: dict[str, tuple[int, ...]] = {
    "Conv": (2,),
    "ConvTranspose": (2,),
    "Gemm": (2,),
    "LSTM": (3,),
    "GRU": (3,),
}
BIASES |= {"LayerNormalization": (1, 2), "Add": (0, 1)}
"""Operator -> inputs that are trained as they are, without being quantized."""

Values = Mapping[str, Tensor]
"""Weights by key, `part/name of the constant`; those left out are the graphs' own."""


@dataclass(frozen=True, kw_only=True)
class WeightPlace:
    """A weight that is quantized.

    Attributes:
        key: `part/name of the constant`.
        part: The graph it is in.
        site: Where in that graph.
    """

    key: str
    part: str
    site: Site


class TrainedNetwork:
    """The graphs of a network as torch modules on one device.

    Attributes:
        parts: The graphs by name; a network of one graph has the part "model".
        weights: What is quantized, by key, in graph order.
        biases: The values of what is trained without being quantized, by key, on the device.
    """

    def __init__(
        self, parts: Mapping[str, gs.Graph], taps: Mapping[str, Iterable[str]], device: str
    ) -> None:
        """Compile the graphs.

        Args:
            parts: The float graphs, not changed.
            taps: Per part, further tensors to be returned.
            device: Of torch.

        Raises:
            IntqError: A graph holds an operator that torch_graph has not.
        """
        self.parts, self.device = dict(parts), device
        self.weights = {place.key: place for place in weight_places(parts)}
        self._nets = {
            name: TorchGraph(graph, taps=taps.get(name, ())).to(device)
            for name, graph in parts.items()
        }
        self.biases = {
            f"{part}/{name}": self._nets[part].weights[name].detach()
            for part, graph in parts.items()
            for name in bias_names(graph)
            if f"{part}/{name}" not in self.weights
        }

    def run(self, part: str, feeds: Mapping[str, Tensor], values: Values) -> dict[str, Tensor]:
        """The outputs and taps of a part whose weights are `values`, by name.

        Raises:
            IntqError: The feeds do not suit the graph.
        """
        replaced = {
            parameter_name(name): tensor
            for key, tensor in values.items()
            for owner, _, name in (key.partition("/"),)
            if owner == part
        }
        net: nn.Module = self._nets[part]
        found: dict[str, Tensor] = torch.func.functional_call(net, replaced, (dict(feeds),))
        return found


def weight_places(parts: Mapping[str, gs.Graph]) -> list[WeightPlace]:
    """What can be quantized, in the order of the parts and of their nodes."""
    return [
        WeightPlace(key=f"{part}/{site.name}", part=part, site=site)
        for part, graph in parts.items()
        for site in quantizable_weights(graph)
    ]


def bias_names(graph: gs.Graph) -> list[str]:
    """The float constants that are added along an axis, or scale a normalized one."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        for index in BIASES.get(node.op, ()):
            tensor = node.inputs[index] if index < len(node.inputs) else None
            if isinstance(tensor, gs.Constant) and _is_vector(tensor, node.op):
                found[tensor.name] = None
    return list(found)


def _is_vector(tensor: gs.Constant, operator: str) -> bool:
    """Tables that are added, such as positions, are not biases; those of recurrent layers are."""
    shape = tensor.values.shape
    longest = max(shape, default=1)
    along_one = operator in {"LSTM", "GRU"} or longest == tensor.values.size
    return tensor.values.dtype.name == "float32" and along_one and longest > 1
