"""What `quantize` did, counted and described."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnx_intq.graph import constant, producer
from onnx_intq.placement import QUANTIZABLE
from onnx_intq.qdq import dequantizer
from onnx_intq.transform import Report
from onnx_intq.verify import Drift

COMPUTING = set().union(*QUANTIZABLE.values())
"""Operators that run on integers for some target."""
INTEGER = {"ConvInteger", "MatMulInteger"}
"""Products of integers, as target integer has them."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was done, for people and for JSON.

    Attributes:
        quantized: Operator type -> nodes that run on integers.
        left: (node, reason) for quantizable nodes that stay float.
        wide: Tensors that got 16 bits by measurement -> SQNR that 8 would have left, dB.
        remaining: (node, reason) for BatchNorms that could not be folded, and for operators without
            integer form.
        bytes_before, bytes_after: File sizes.
        drift: Of the outputs.
        drift_on: What they were computed from.
        integer_only: For target integer, what keeps the model from being integer-only: nothing, if
            that is proven. None for other targets.
        seconds: Stage -> wall time.
        recipe: The passes, as text that reads back.
        reports: One per pass.
    """

    quantized: dict[str, int]
    left: tuple[tuple[str, str], ...]
    wide: dict[str, float]
    remaining: tuple[tuple[str, str], ...]
    bytes_before: int
    bytes_after: int
    drift: Drift
    drift_on: str
    integer_only: tuple[str, ...] | None
    seconds: dict[str, float]
    recipe: str
    reports: tuple[Report, ...]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "quantized": self.quantized,
            "left": self.left,
            "wide": self.wide,
            "remaining": self.remaining,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "drift": {"largest": self.drift.largest, "sqnr": self.drift.sqnr},
            "integer_only": None if self.integer_only is None else not self.integer_only,
            "float": self.integer_only or (),
            "seconds": self.seconds,
            "recipe": self.recipe,
            "passes": [{"pass": str(r.spec), "changes": r.changes} for r in self.reports],
        }


def quantized_nodes(graph: gs.Graph, left: Collection[str]) -> dict[str, int]:
    """Operator type -> how many nodes compute on dequantized activations, or store LSTM weights.

    Args:
        graph: A Q/DQ graph.
        left: Names of nodes that stay float, although others may have quantized what they read.
    """
    names = (
        node.op
        for node in graph.nodes
        if node.op in INTEGER
        or (
            node.op in COMPUTING
            and node.name not in left
            and any(_is_activation(producer(t)) for t in node.inputs)
        )
        or (node.op == "LSTM" and dequantizer(node.inputs[1]) is not None)
    )
    return dict(sorted(Counter(names).items()))


def describe_nothing(skipped: Sequence[tuple[str, str]]) -> str:
    """One line that says why no node was quantized: the first reason."""
    name, why = skipped[0] if skipped else ("the model", "it has none of these operators")
    return (
        f"nothing was quantized ({name}: {why}); expected at least one of: "
        f"{', '.join(sorted(COMPUTING))}; use the float model as it is"
    )


def describe_remaining(remaining: Sequence[tuple[str, str]]) -> str:
    """One line that names the first BatchNorm that stays, and how many more do."""
    name, why = remaining[0]
    more = f" (and {len(remaining) - 1} more)" if len(remaining) > 1 else ""
    return (
        f"BatchNormalization {name!r} cannot be folded{more}: {why}; "
        "expected none to stay; let them stay with --allow-bn"
    )


def describe_float(remaining: Sequence[tuple[str, str]]) -> str:
    """One line that names the first operator without integer form, and how many more there are."""
    name, why = remaining[0]
    more = f" (and {len(remaining) - 1} more)" if len(remaining) > 1 else ""
    return (
        f"{name!r} has no integer form{more}: {why}; "
        "expected none to stay float; let them stay with --allow-float"
    )


def _is_activation(node: gs.Node | None) -> bool:
    return node is not None and node.op == "DequantizeLinear" and constant(node, 0) is None
