"""Reads the text in which TensorRT-RTX describes an engine's layers; its format is undocumented."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>\[.*?\]), "
    r"Constants: \[.*?\], Outputs: (?P<outputs>\[.*?\]), TacticName: .*, Metadata: (?P<nodes>.*)$"
)
TYPE = re.compile(r"Datatype: (\w+)")
NODE = re.compile(r"\[ONNX Layer: ([^\x1f]*)\]")
KERNELS, FUSION = {"correlation", "deconv", "gemm"}, "runtime_fusion"
"""Kinds of layers that multiply matrices: in the type of their first input, and, what is compiled
at run time, in a type it may cast int8 to. Layers of other kinds convert, add, activate and so on.
"""


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
        certain = layer.kind in KERNELS or (layer.kind == FUSION and "int8" not in layer.inputs)
        if certain and layer.inputs:
            types |= dict.fromkeys(layer.nodes, layer.inputs[0])
    return tuple(
        Product(name=name, kind=kind, precision=types.get(name, "")) for name, kind in weighted
    )


def _types(text: str) -> tuple[str, ...]:
    return tuple(found.lower() for found in TYPE.findall(text))
