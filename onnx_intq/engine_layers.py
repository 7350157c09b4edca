"""Reads how an engine describes its layers: which compute in int8, and which Q/DQ stand alone.

Two forms: the text TensorRT-RTX logs as it builds, whose format is undocumented, and the JSON of
TensorRT's engine inspector, whose keys differ between 10.x and 11.x ("Migrating IEngineInspector
Usage from TensorRT 10.x to 11.x").
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>\[.*?\]), "
    r"Constants: \[.*?\], Outputs: (?P<outputs>\[.*?\]), TacticName: .*, Metadata: (?P<nodes>.*)$"
)
TYPE = re.compile(r"Datatype: (\w+)")
NODE = re.compile(r"\[ONNX Layer: ([^\x1f]*)\]")
KERNEL, FUSION = re.compile("conv|correlation|gemm|matrix|matmul", re.IGNORECASE), "runtime_fusion"
"""Kinds of layers that multiply matrices: in the type of their first input, and, what is compiled
at run time, in a type it may cast int8 to. Layers of other kinds convert, add, activate and so on.
"""
TYPE_KEYS = ("Datatype", "DataType", "Format/Datatype")
"""Where the inspector tells a tensor's type: releases differ."""
TYPES = re.compile(r"\b(u?int8|u?int32|int64|int4|float|fp32|half|fp16|bf16|fp8|fp4|bool)\b", re.I)
RENAMED = {"fp32": "float", "fp16": "half"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One step of an engine.

    Attributes:
        name: The library's own.
        kind: The library's own: "correlation" is a convolution, "kgen" a generated kernel.
        inputs: The types of what it reads, constants left out, such as "int8" and "float".
        outputs: The types of what it writes.
        nodes: Names of the ONNX nodes it came from.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies matrices, in the type of its first input."""
        return KERNEL.search(self.kind) is not None


@dataclass(frozen=True, kw_only=True)
class Product:
    """A convolution or matrix product of the model.

    Attributes:
        name: Of its ONNX node.
        kind: "conv", "conv_transpose" or "matmul" (Gemm too).
        precision: The type it computes in, such as "int8" or "float"; "" where the library does
            not tell.
    """

    name: str
    kind: str
    precision: str


def read_layers(text: str) -> tuple[Layer, ...]:
    """The layers described in either form, in order of execution; none in any other form."""
    return layers_from_json(text) if text.lstrip().startswith("{") else layers_from_text(text)


def layers_from_json(text: str) -> tuple[Layer, ...]:
    """The layers of the inspector's JSON; those of which only the name is told are left out."""
    try:
        entries = json.loads(text).get("Layers", [])
    except ValueError:
        return ()
    return tuple(_layer(entry) for entry in entries if isinstance(entry, dict))


def layers_from_text(text: str) -> tuple[Layer, ...]:
    """The layers described in `text`, one per line; other lines are passed over."""
    found = (LINE.match(line) for line in text.split("\n"))
    return tuple(
        Layer(
            name=match["name"],
            kind=match["kind"],
            inputs=_types(match["inputs"]),
            outputs=_types(match["outputs"]),
            nodes=tuple(NODE.findall(match["nodes"])),
        )
        for match in found
        if match is not None
    )


def products(weighted: Iterable[Sequence[str]], layers: Iterable[Layer]) -> tuple[Product, ...]:
    """Find the type that each product of `weighted`, (name, kind) pairs, computes in."""
    types: dict[str, str] = {}
    for layer in layers:
        certain = layer.multiplies or (layer.kind == FUSION and "int8" not in layer.inputs)
        if certain and layer.inputs:
            types |= dict.fromkeys(layer.nodes, layer.inputs[0])
    return tuple(
        Product(name=name, kind=kind, precision=types.get(name, "")) for name, kind in weighted
    )


def alone(layers: Iterable[Layer], quantizers: Collection[str]) -> tuple[str, ...]:
    """Names of Q/DQ nodes that have a layer of their own: they were not fused with any operator.

    Args:
        layers: Of the engine.
        quantizers: Names of the model's Q/DQ nodes, those at its boundary left out.
    """
    names = set(quantizers)
    own = [layer.nodes for layer in layers if layer.nodes and names.issuperset(layer.nodes)]
    return tuple(dict.fromkeys(node for nodes in own for node in nodes))


def _layer(entry: Mapping[str, Any]) -> Layer:
    return Layer(
        name=str(entry.get("Name", "")),
        kind=str(entry.get("LayerType", "")),
        inputs=_json_types(entry.get("Inputs", [])),
        outputs=_json_types(entry.get("Outputs", [])),
        nodes=tuple(NODE.findall(str(entry.get("Metadata", "")))),
    )


def _json_types(tensors: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    told = (next((str(t[key]) for key in TYPE_KEYS if key in t), "") for t in tensors)
    found = (TYPES.search(text) for text in told)
    names = (match.group().lower() if match else "" for match in found)
    return tuple(RENAMED.get(name, name) for name in names)


def _types(text: str) -> tuple[str, ...]:
    return tuple(found.lower() for found in TYPE.findall(text))
