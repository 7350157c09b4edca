"""An ONNX graph as a differentiable torch module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnx_intq.torch_ops.dtypes import tensor_from_numpy
from onnx_intq.torch_program import Compiler
from onnx_intq.transform import IntqError


def parameter_name(tensor: str) -> str:
    """The module attribute that holds the ONNX initializer called `tensor`."""
    return "onnx:" + tensor.replace("%", "%25").replace(".", "%2E")


def tensor_name(parameter: str) -> str:
    """The ONNX initializer held in a module attribute; the inverse of `parameter_name`."""
    return parameter.removeprefix("onnx:").replace("%2E", ".").replace("%25", "%")


class TorchGraph(torch.nn.Module):
    """Runs an ONNX graph in torch, operator by operator, differentiable in feeds and weights.

    Floating-point initializers are parameters that ask for no gradient until told to
    (`net.weights["w"].requires_grad_()`); the others are buffers. For one call another tensor takes
    a weight's place: `torch.func.functional_call(net, {parameter_name("w"): other}, (feeds,))`.

    Small integer initializers and what is computed from shapes stay on the CPU on any device, so
    shape arithmetic never waits for it. Dropout and BatchNormalization behave as at inference.
    QuantizeLinear passes gradients straight through inside its grid.

    Args:
        graph: The graph, not changed; its weights are copied.
        taps: Names of further tensors to return.

    Raises:
        IntqError: The graph holds an operator, attribute or element type that is not supported, or
            a tap is no tensor of it.
    """

    def __init__(self, graph: gs.Graph, taps: Iterable[str] = ()) -> None:
        super().__init__()
        taps = tuple(taps)
        compiler = Compiler(opset=graph.opset, keep=frozenset(taps))
        self._program = compiler.compile(graph)
        self._results = tuple(dict.fromkeys(self._program.outputs + taps))
        self._host: dict[str, Tensor] = {}
        for name, constant in compiler.constants.items():
            self._hold(name, constant)
        self._held = tuple(n for n in compiler.constants if n not in self._host)
        known = {*self._program.inputs, *compiler.constants}
        known.update(name for step in self._program.steps for name in step.outputs)
        if missing := [tap for tap in taps if tap not in known]:
            raise IntqError(
                f"tap {missing[0]!r}: the graph has no such tensor; expected the name of a tensor "
                "outside of If and Loop bodies; check the name"
            )

    @property
    def weights(self) -> dict[str, torch.nn.Parameter]:
        """The floating-point initializers by ONNX name."""
        return {tensor_name(name): p for name, p in self.named_parameters(recurse=False)}

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            feeds: One tensor per graph input, by name, on the module's device.

        Returns:
            The graph's outputs, then the taps, by name.

        Raises:
            IntqError: A feed is missing or unknown, or a node fails on its inputs.
        """
        if wrong := sorted(feeds.keys() ^ set(self._program.inputs)):
            raise IntqError(
                f"feed {wrong[0]!r} is {'unknown' if wrong[0] in feeds else 'missing'}; "
                f"expected exactly: {', '.join(self._program.inputs)}; check the names"
            )
        values = dict(feeds) | self._host
        values |= {name: getattr(self, parameter_name(name)) for name in self._held}
        self._program.run(values)
        return {name: values[name] for name in self._results}

    def _hold(self, name: str, constant: gs.Constant) -> None:
        tensor = tensor_from_numpy(constant.values)
        if tensor.is_floating_point():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(parameter_name(name), parameter)
        elif tensor.dtype in (torch.int64, torch.bool) and tensor.ndim <= 1:
            self._host[name] = tensor
        else:
            _refuse_sub_byte(constant)
            self.register_buffer(parameter_name(name), tensor)


def _refuse_sub_byte(constant: gs.Constant) -> None:
    """Integers below 8 bits are held in 8, which only DequantizeLinear cannot tell apart."""
    name = constant.values.dtype.name
    if name not in ("int4", "uint4", "int2", "uint2"):
        return
    if others := [n for n in constant.outputs if n.op != "DequantizeLinear"]:
        raise IntqError(
            f"node {others[0].name!r} ({others[0].op}) reads {constant.name!r} of type {name}; "
            "expected DequantizeLinear to be its only reader; quantize with 8 bits"
        )
