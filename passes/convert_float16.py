"""Converts a float32 graph to float16 inside; its inputs and outputs stay float32.

Before: `y = LogSoftmax(Conv(x, w))`, all float32.
After: `y = LogSoftmax(Cast<to=FLOAT>(Conv(Cast<to=FLOAT16>(x), w_float16)))`.
Condition: no bodies, no Q/DQ nodes. What float16 (11 bits, up to 65504) spoils stays float32:
`RISKY` operators, squares, numbers made of integers (lengths), a final Softmax; and what reads only
their results, up to the next product. BatchNormalizations stay, too: run fold_bn first.
Law: a constant moves by at most half a step of float16, or is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, element_type, require_float32, sort
from onnx_intq.placement import MOVING, WEIGHTED
from onnx_intq.qdq import QDQ
from onnx_intq.transform import Context, Pass, PassError

FLOAT, FLOAT16, BOOL = (getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "BOOL"))
AMPLIFYING = {"Log", "Exp", "Pow", "Reciprocal", "Sqrt", "LogSoftmax"}
SUMS = {"CumSum", "CumProd", "InstanceNormalization", "GroupNormalization", "LpNormalization"}
SUMS |= {f"Reduce{name}" for name in ("Sum", "Mean", "L1", "L2", "SumSquare", "Prod")}
SUMS |= {"ReduceLogSum", "ReduceLogSumExp"}
RISKY = dict.fromkeys(AMPLIFYING, "it amplifies rounding errors or overflows")
RISKY |= dict.fromkeys(SUMS, "its sums or products can overflow")
RISKY["BatchNormalization"] = "its statistics need float32; run fold_bn first"


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
        """Convert; return how many nodes now compute on float16."""
        for node in model.nodes:
            _refuse(node)
            if any(_holds(t, FLOAT16) for t in node.outputs):
                ctx.skip(node, "float16 already; the model is left as it is")
                return 0
        require_float32(model)
        sort(model)
        kept, chosen = set[int](), list[gs.Node]()  # ids of nodes that stay float32; the others
        for node in model.nodes:
            if not any(_holds(t, FLOAT) for t in (*node.inputs, *node.outputs)):
                continue
            if why := self._reason_against(node, model, kept):
                kept.add(id(node))
                ctx.skip(node, why)
            else:
                chosen.append(node)
        _Conversion(model, Names(model)).apply(chosen)
        return len(chosen)

    def _reason_against(self, node: gs.Node, model: gs.Graph, kept: set[int]) -> str:
        """Why `node` stays float32, "" if it need not."""
        if any(fnmatchcase(node.name, pattern) for pattern in self.keep):
            return "kept float32 by request"
        if why := _reason_of_types(node, model.opset) or _reason_of_values(node, model):
            return why
        floats = [t for t in node.inputs if isinstance(t, gs.Variable) and _holds(t, FLOAT)]
        alone = floats and all(t.inputs and id(t.inputs[0]) in kept for t in floats)
        return "it reads nothing but float32" if alone and node.op not in WEIGHTED else ""


def _refuse(node: gs.Node) -> None:
    found = "is quantized: its precision is its own" if node.op in QDQ else ""
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        found = "has a body"
    if found:
        raise PassError(
            f"{node.op} {node.name!r} {found}; expected a float model without If, Loop and Scan; "
            "start from the float model, exported without control flow"
        )


def _holds(tensor: gs.Tensor, number: int) -> bool:
    return not tensor.is_empty() and element_type(tensor) == number


def _reason_of_types(node: gs.Node, opset: int) -> str:
    if node.domain not in {None, "", "ai.onnx"} or "dtype" in node.attrs or node.op == "Constant":
        return "its domain or an attribute fixes its types"
    if any(element_type(t) is None for t in (*node.inputs, *node.outputs) if not t.is_empty()):
        return "a type of its tensors is not known"
    results = [i for i, t in enumerate(node.outputs) if _holds(t, FLOAT)]
    takes = all(_takes_float16(node, "outputs", i, opset) for i in results)
    return "" if takes else "ONNX has it in float32 only"


def _takes_float16(node: gs.Node, side: str, index: int, opset: int) -> bool:
    formal = getattr(onnx.defs.get_schema(node.op, opset, ""), side)
    return "tensor(float16)" in formal[min(index, len(formal) - 1)].types  # the last may be many


def _reason_of_values(node: gs.Node, model: gs.Graph) -> str:
    if node.op == "Mul" and node.inputs[0] is node.inputs[1]:
        return "squares can overflow"
    if node.op in {"Cast", "CastLike"} and element_type(node.inputs[0]) not in {FLOAT, BOOL}:
        return "it counts; float16 holds no integer beyond 2048 exactly"
    final = node.op == "Softmax" and _is_final(node, model)
    return "it makes an output" if final else RISKY.get(node.op, "")


def _is_final(node: gs.Node, model: gs.Graph) -> bool:
    """Whether a node's result is an output of the graph, or is moved into one."""
    made = list(node.outputs)
    for tensor in made:
        made += [t for reader in tensor.outputs if reader.op in MOVING for t in reader.outputs]
    return any(tensor is t for tensor in made for t in model.outputs)


@dataclass(frozen=True)
class _Conversion:
    """One model's: gives each reader its tensors in the type it computes on, made once each."""

    model: gs.Graph
    names: Names
    made: dict[tuple[str, int], gs.Tensor] = field(default_factory=dict[Any, gs.Tensor])

    def apply(self, chosen: list[gs.Node]) -> None:
        for node in chosen:
            _set_results(node)
        ids, opset = {id(node) for node in chosen}, self.model.opset
        for node in list(self.model.nodes):
            for index, tensor in enumerate(node.inputs):
                half = id(node) in ids and _takes_float16(node, "inputs", index, opset)
                if _holds(tensor, FLOAT if half else FLOAT16):
                    node.inputs[index] = self._converted(tensor, node, FLOAT16 if half else FLOAT)
        for index, tensor in enumerate(self.model.outputs):
            if _holds(tensor, FLOAT16):
                result = self._converted(tensor, tensor.inputs[0], FLOAT)
                self.model.outputs[index] = result
                result.name, tensor.name = tensor.name, result.name

    def _converted(self, tensor: gs.Tensor, node: gs.Node, to: int) -> gs.Tensor:
        if (key := (tensor.name, to)) not in self.made:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(to)
            name = self.names.new(f"{tensor.name}_{dtype.name}")
            if isinstance(tensor, gs.Constant) and not any(tensor is t for t in self.model.inputs):
                self.made[key] = gs.Constant(name, _half(tensor, node))
            else:
                result = gs.Variable(name, dtype, tensor.shape)
                self.model.nodes.append(gs.Node("Cast", name, {"to": to}, [tensor], [result]))
                self.made[key] = result
        return self.made[key]


def _set_results(node: gs.Node) -> None:
    if node.op == "Cast" and node.attrs["to"] == FLOAT:
        node.attrs["to"] = FLOAT16
    if node.op == "ConstantOfShape" and _holds(node.outputs[0], FLOAT):
        value = node.attrs.get("value") or gs.Constant("value", np.zeros(1, np.float32))
        node.attrs["value"] = gs.Constant(value.name, _half(value, node))
    for tensor in node.outputs:
        if _holds(tensor, FLOAT):
            tensor.dtype = np.dtype(np.float16)


def _half(tensor: gs.Constant, node: gs.Node) -> Any:
    """The values in float16, refused where they overflow, or where all that are not 0 become 0."""
    values = np.asarray(tensor.values)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if (np.isinf(half) & np.isfinite(values)).any() or (values.any() and not half.any()):
        raise PassError(
            f"constant {tensor.name!r} of {node.op} {node.name!r} reaches {np.abs(values).max():g};"
            " expected values that float16 holds, up to 65504 and not all below 3e-8; "
            f"let the node stay float32: keep=({node.name!r},)"
        )
    return half
