"""Says in the user's terms why the library refused a model: which node, what is wrong, what helps.

The parser numbers the nodes of the file and calls those without a name `node_of_<output>`; here
they have the names that `check` and the passes use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from onnx_intq.check import check
from onnx_intq.graph import graph_from_model

UNNAMED = "node_of_"
"""How the parser calls a node without a name, before its first output's name."""
REQUANTIZE = "quantize the float model with --target tensorrt"
ADVICE: tuple[tuple[str, str], ...] = (
    ("zero point", REQUANTIZE),
    ("import initializer", "leave out -a 16 and a16: 16-bit grids are for onnxruntime"),
    ("has type Int32 but", f"keep biases float: {REQUANTIZE}"),
    ("Quantized constant", "store it in int32: int8 constants stand before DequantizeLinear alone"),
    ("GEMM is not supported", "build for 8.0 or newer, or with --backend tensorrt"),
    ("Plugin not found", "export the model with standard ONNX operators"),
    ("(?i)implementation", "give other --shapes or a larger --workspace"),
    ("(?i)cache miss|timing cache", "build without the pin, or with the model it was made for"),
    ("(?i)shape|dimension|volume", "give --shapes that the model can run; try fold_constants"),
    ("(?i)type", "cast its inputs to a type it takes, or keep it float"),
)
"""What to do, by a pattern of the library's words; the first that matches."""
NOISE: tuple[tuple[str, str], ...] = (
    (r"\[checkMacros\.cpp.*", ""),  # what else fails without a GPU
    (r"^(Assertion failed|IBuilder::\w+|I?\w+::\w+): ", ""),
    (r"^(creator && |[\w:().>-]+: (?=[A-Z]))", ""),  # the failed condition
    (r'^"([^"]*)"$', r"\1"),
    (r"\.? ?(Please set k\w+|In [\w()]+ at /_src/)[^)]*", ""),
    (r"^Invalid Node - \S+ (\w+::\w+: )?", ""),
    (r"^.*(?=Failed to import initializer)", ""),
    (r"^Error Code \d+: ", ""),
)
"""What the library's messages hold besides the reason, by pattern, and what takes its place."""
UNSUPPORTED = (
    f"use an operator it has; a model of target ort or integer is not for TensorRT: {REQUANTIZE}"
)
ASK = "see what onnx-intq check --target tensorrt says"


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A node that the library's parser cannot take.

    Attributes:
        node: Its name, as the passes and `check` call it; "" where no node is at fault.
        operator: Its type.
        reason: The library's words.
        advice: What helps; a rule of `check` where one is broken there.
    """

    node: str
    operator: str
    reason: str
    advice: str

    def __str__(self) -> str:
        """One line."""
        place = f"node {self.node!r} ({self.operator})" if self.node else "the model"
        return f"{place}: {self.reason}; {self.advice}"


def refusals(model: onnx.ModelProto, found: Sequence[Mapping[str, Any]]) -> tuple[Refusal, ...]:
    """What the parser said, in terms of `model`, the file it read."""
    if not found:
        return ()
    graph = graph_from_model(model)
    problems = _problems(graph)
    return tuple(_refusal(model, graph, problems, entry) for entry in found)


def failure(model: onnx.ModelProto, reason: str) -> str:
    """What the builder said, after the node it named, if any, and before what helps."""
    graph = graph_from_model(model)
    node, reason = _named_in(graph, reason), plain(reason)
    place = f"node {node.name!r} ({node.op}): " if node is not None else ""
    advice = _problems(graph).get(node.name) if node is not None else None
    return f"{place}{reason}; {advice or _advice(reason) or ASK}"


def plain(reason: str) -> str:
    """The library's words without the places and conditions in its source."""
    for pattern, replacement in NOISE:
        reason = re.sub(pattern, replacement, reason).strip()
    return reason or "it gives no reason"


def _refusal(
    model: onnx.ModelProto, graph: gs.Graph, problems: Mapping[str, str], entry: Mapping[str, Any]
) -> Refusal:
    operator, reason = entry["operator"], plain(entry["reason"])
    node = _node(model, graph, entry)
    name = entry["name"] or (f"number {entry['index']}" if entry["index"] >= 0 else "")
    if node is not None:
        name = node.name
    if entry["function"]:
        name = f"{name} of {entry['function']}"
    if reason == "false":  # the failed condition of a refused operator, in the parser's code
        reason = f"operator {operator} is not supported"
    default = UNSUPPORTED if "not supported" in reason else ASK
    advice = problems.get(name) or _advice(reason) or default
    return Refusal(node=name, operator=operator, reason=reason, advice=advice)


def _node(model: onnx.ModelProto, graph: gs.Graph, entry: Mapping[str, Any]) -> gs.Node | None:
    """The node at fault; None in a function, whose nodes are numbered on their own."""
    index = entry["index"]
    if entry["function"] or not 0 <= index < len(model.graph.node):
        return None
    outputs = set(model.graph.node[index].output)
    made = (n for n in graph.nodes if any(t.name in outputs for t in n.outputs))
    return next(made, None)


def _named_in(graph: gs.Graph, text: str) -> gs.Node | None:
    """The node whose name, as the library calls it, stands in `text`: the longest, if several.

    A constant in parentheses stands for the node that reads it.
    """
    names = {name: node for node in graph.nodes for name in _names(node)}
    words = (re.escape(name) for name in sorted(names, key=len, reverse=True) if name)
    found = re.search(rf"(?<![\w/.])({'|'.join(words)})(?![\w/])", text)
    return names[found.group()] if found else None


def _names(node: gs.Node) -> tuple[str, ...]:
    made = (UNNAMED + tensor.name for tensor in node.outputs)
    read = (f"({tensor.name})" for tensor in node.inputs if isinstance(tensor, gs.Constant))
    return (node.name, *made, *read)


def _problems(graph: gs.Graph) -> dict[str, str]:
    """Node -> the first rule of target tensorrt that it breaks."""
    found = reversed(check(graph, "tensorrt"))
    return {p.node: f"rule {p.rule}: {p.message}" for p in found}


def _advice(reason: str) -> str | None:
    return next((advice for pattern, advice in ADVICE if re.search(pattern, reason)), None)
