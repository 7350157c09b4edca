"""Checks a Q/DQ model against a target's rules, on the graph alone: nothing is built or run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnx_intq import (
    ort_fusion_rules,
    ort_rules,
    qdq_rules,
    tensorrt_placement_rules,
    tensorrt_type_rules,
)
from onnx_intq.qdq_rules import Rule
from onnx_intq.transform import IntqError

RULES: Mapping[str, tuple[Rule, ...]] = {
    "ort": (*ort_rules.RULES, *qdq_rules.RULES, *ort_fusion_rules.RULES),
    "tensorrt": (
        *tensorrt_type_rules.RULES,
        *qdq_rules.RULES,
        *tensorrt_placement_rules.RULES,
    ),
}
"""The rules of every target, in the order they are applied."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A node that breaks a rule.

    Attributes:
        node: Its name; "model" where the whole model breaks the rule.
        rule: The rule's name.
        message: What was found; what was expected; what to do.
    """

    node: str
    rule: str
    message: str


def check(graph: gs.Graph, target: str) -> list[Problem]:
    """Everything in `graph` that `target` refuses, computes wrongly, or does not run on integers.

    Args:
        graph: A Q/DQ model, as `graph.load` gives it.
        target: A key of `RULES`.

    Raises:
        IntqError: Unknown target.
    """
    if target not in RULES:
        raise IntqError(f"unknown target {target!r}; expected one of: {', '.join(RULES)}")
    return [
        Problem(node=node, rule=name, message=message)
        for name, rule in RULES[target]
        for node, message in rule(graph)
    ]
