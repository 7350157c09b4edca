"""Checks a Q/DQ model against a target's rules, on the graph alone: nothing is built or run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnx_intq import (
    ort_fusion_rules,
    ort_rules,
    qdq_rules,
    tensorrt_placement_rules,
    tensorrt_speed_rules,
    tensorrt_type_rules,
)
from onnx_intq.coded_weights import is_weight_only
from onnx_intq.qdq_rules import Rule
from onnx_intq.transform import IntqError

if TYPE_CHECKING:
    from onnx_intq.engine import Parse

MODEL = "model"
"""In place of a node's name, where no single node is at fault."""
RULES: Mapping[str, tuple[Rule, ...]] = {
    "ort": (*ort_rules.RULES, *qdq_rules.RULES, *ort_fusion_rules.RULES),
    "tensorrt": (
        *tensorrt_type_rules.RULES,
        *qdq_rules.RULES,
        *tensorrt_placement_rules.RULES,
    ),
}
"""The rules of every target, in the order they are applied."""
WARNINGS: Mapping[str, tuple[Rule, ...]] = {
    "ort": ort_fusion_rules.WARNINGS,
    "tensorrt": tensorrt_speed_rules.RULES,
}
"""Rules whose breach costs speed at most."""


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


WEIGHTS_ONLY = Problem(
    node=MODEL,
    rule="weights-only",
    message="the weights alone are integers; expected quantized activations, too, for TensorRT to "
    "compute in integers; quantize it with --target tensorrt",
)
"""Of a model that is so on purpose, in place of all problems of the rules `OF_WEIGHTS_ONLY`."""
OF_WEIGHTS_ONLY = {"missing-zero-point", "one-sided"}


def check(graph: gs.Graph, target: str) -> list[Problem]:
    """Everything in `graph` that `target` refuses, computes wrongly, or does not run on integers.

    Args:
        graph: A Q/DQ model, as `graph.load` gives it.
        target: A key of `RULES`.

    Raises:
        IntqError: Unknown target.
    """
    found = _problems(graph, target, RULES)
    others = [problem for problem in found if problem.rule not in OF_WEIGHTS_ONLY]
    # Weights of LSTMs alone are no problem: TensorRT has no integer LSTM.
    if target == "tensorrt" and len(others) < len(found) and is_weight_only(graph):
        return [WEIGHTS_ONLY, *others]  # one cause of many problems
    return found


def warn(graph: gs.Graph, target: str) -> list[Problem]:
    """What `target` takes, but likely not faster than in float: arguments and errors of `check`."""
    return _problems(graph, target, WARNINGS)


def refused(parse: Parse | None) -> list[Problem]:
    """What NVIDIA's parser cannot take, as problems of the rule "parser"; none if not asked."""
    if parse is None:
        return []
    return [
        Problem(
            node=refusal.node or MODEL,
            rule="parser",
            message=f"{refusal.reason}; expected what the parser of {parse.library} takes; "
            f"{refusal.advice}",
        )
        for refusal in parse.refusals
    ]


def packed_weights(count: int, target: str) -> list[Problem]:
    """That a model has packed weights, which TensorRT's parser has no operators to decode."""
    if not count or target != "tensorrt":
        return []
    message = (
        f"{count} weights are packed; expected int8 constants, for TensorRT cannot decode them; "
        "store them so with the pass unpack_weights"
    )
    return [Problem(node=MODEL, rule="packed-weights", message=message)]


def _problems(graph: gs.Graph, target: str, rules: Mapping[str, tuple[Rule, ...]]) -> list[Problem]:
    if target not in rules:
        raise IntqError(f"unknown target {target!r}; expected one of: {', '.join(rules)}")
    return [
        Problem(node=node, rule=rule.name, message=message)
        for rule in rules[target]
        for node, message in rule.find(graph)
    ]
