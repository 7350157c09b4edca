"""Converts a float32 graph to float16 inside; its inputs and outputs stay float32.

Before: `y = LogSoftmax(Conv(x, w))`, all float32.
After: `y = LogSoftmax(Cast<to=FLOAT>(Conv(Cast<to=FLOAT16>(x), w16)))`.
Condition: neither quantized nor with bodies. What float16 (11 bits, up to 65504) spoils stays
float32: functions that amplify rounding errors, sums, squares, numbers made of integers (lengths
beyond 2048), a final softmax, and what reads nothing but their results, up to the next product.
Law: a constant moves by at most half an epsilon of float16, or half its smallest number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, element_type, require_float32, sort
from onnx_intq.placement import MOVING, SENSITIVE, WEIGHTED
from onnx_intq.qdq import QDQ
from onnx_intq.transform import Context, Pass, PassError

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
LARGEST = float(np.finfo(np.float16).max)
SUMS = {"ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum"}
SUMS |= {"ReduceLogSumExp", "CumSum", "ReduceProd", "InstanceNormalization", "GroupNormalization"}
AMPLIFYING = SENSITIVE - {"Div"} | {"Exp", "LogSoftmax"}
UNFOLDED = "its statistics need float32; run fold_bn first"


@dataclass(frozen=True, kw_only=True)
class ConvertFloat16(Pass):
    """Compute in float16 what bears it.

    Attributes:
        keep: Glob patterns of nodes that stay float32.
    """

    keep: tuple[str, ...] = ()

    operators: ClassVar[frozenset[str]] = frozenset(s.name for s in onnx.defs.get_all_schemas())
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Convert; return how many nodes compute in float16 or read it."""
        for node in model.nodes:
            _refuse(node)
            if any(_holds(t, FLOAT16) for t in node.outputs):
                ctx.skip(node, "float16 already, so the model is left as it is")
                return 0
        require_float32(model)
        sort(model)
        kept = dict[int, str]()
        for node in model.nodes:
            if why := self._reason_against(node, model, kept):
                kept[id(node)] = why
                if any(_holds(t, FLOAT) for t in node.outputs):
                    ctx.skip(node, why)
        return _Conversion(model, Names(model)).apply([n for n in model.nodes if id(n) not in kept])

    def _reason_against(self, node: gs.Node, model: gs.Graph, kept: dict[int, str]) -> str:
        """Why `node` stays float32, "" if it need not; `kept` has the ids of those before it."""
        inputs = [t for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()]
        if not any(_holds(t, FLOAT) for t in (*node.inputs, *node.outputs)):
            return "it has no float tensors"
        if any(fnmatchcase(node.name, pattern) for pattern in self.keep):
            return "kept float32 by request"
        if why := _reason_of_schema(node, model) or _reason_of_arithmetic(node, model):
            return why
        floats = [t for t in inputs if _holds(t, FLOAT)]
        made = [id(t.inputs[0]) in kept if t.inputs else False for t in floats]
        if node.op not in WEIGHTED and floats and all(made):
            return "it reads nothing but float32 results"
        return ""


def _refuse(node: gs.Node) -> None:
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        raise PassError(
            f"{node.op} {node.name!r} has bodies; expected a graph without If, Loop and Scan; "
            "export the model without control flow"
        )
    if node.op in QDQ:
        raise PassError(
            f"{node.op} {node.name!r}: the model is quantized, its precision is in its Q/DQ nodes; "
            "expected a float model; start from the file it was made of"
        )


def _holds(tensor: gs.Tensor, number: int) -> bool:
    return not tensor.is_empty() and element_type(tensor) == number


def _reason_of_schema(node: gs.Node, model: gs.Graph) -> str:
    if node.domain not in {None, "", "ai.onnx"}:
        return f"an operator of the domain {node.domain!r}"
    if any(element_type(t) is None for t in (*node.inputs, *node.outputs) if not t.is_empty()):
        return "the types of its tensors are not known"
    if node.op == "Constant" or "dtype" in node.attrs:
        return "an attribute says the type of its result"
    floats = [i for i, t in enumerate(node.outputs) if _holds(t, FLOAT)]
    if not all(_takes_float16(_formal(node, "outputs", i, model.opset)) for i in floats):
        return "ONNX has no such operator on float16"
    return ""


def _reason_of_arithmetic(node: gs.Node, model: gs.Graph) -> str:
    if node.op == "BatchNormalization":
        return UNFOLDED
    if node.op in AMPLIFYING:
        return "it amplifies rounding errors, or its result leaves float16's range"
    if node.op in SUMS or (node.op == "Mul" and node.inputs[0] is node.inputs[1]):
        return "its sums or squares can leave float16's range"
    source = element_type(node.inputs[0]) if node.op in {"Cast", "CastLike"} else FLOAT
    if source not in {FLOAT, onnx.TensorProto.BOOL}:
        return "it counts: float16 holds no integer beyond 2048 exactly"
    return "it makes the outputs" if node.op == "Softmax" and _is_final(node, model) else ""


def _is_final(node: gs.Node, model: gs.Graph) -> bool:
    """Whether a node's results go to the outputs of the graph alone, moved at most."""
    made, outputs = list(node.outputs), {id(t) for t in model.outputs}
    for tensor in made:
        made += [t for reader in tensor.outputs for t in reader.outputs]
    readers = [reader for tensor in made for reader in tensor.outputs]
    return all(r.op in MOVING for r in readers) and any(id(t) in outputs for t in made)


def _formal(node: gs.Node, side: str, index: int, opset: int) -> Any:
    """What ONNX says of a node's input or output; the last of them may stand for many."""
    listed = getattr(onnx.defs.get_schema(node.op, opset, ""), side)
    return listed[min(index, len(listed) - 1)]


def _takes_float16(formal: Any) -> bool:
    return "tensor(float16)" in formal.types
