"""One ONNX node as one call of a torch function."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from torch import Tensor

from onnx_intq import binding
from onnx_intq.binding import Call as Call
from onnx_intq.binding import Read as Read
from onnx_intq.binding import scalar as scalar
from onnx_intq.torch_ops import OPS

Result = Tensor | tuple[Tensor, ...]

_IGNORED = frozenset({"consumed_inputs"})
"""Below opset 6 it told a runtime which inputs it might overwrite."""


def bind(node: gs.Node, opset: int, used_outputs: int) -> Call:
    """The call that computes `node`; arguments and errors as for `onnx_intq.binding.bind`."""
    return binding.bind(
        node,
        OPS,
        opset=opset,
        used_outputs=used_outputs,
        unknown=f"cannot be run in torch; expected one of: If, Loop, {', '.join(sorted(OPS))}; "
        "rewrite or remove it",
        ignored=_IGNORED,
    )
