"""`onnx-intq check`: apply a target's rules to a model, and prove it integer-only."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_intq import options
from onnx_intq.transform import IntqError


@click.command(cls=options.Command)
@options.model
@click.option("--target", type=options.TARGETS, help="Whose rules to check.")
@click.option(
    "--integer-only", is_flag=True, help="Prove that all tensors but the boundary's are integers."
)
@options.as_json
def check(model: Path, target: str | None, integer_only: bool, as_json: bool) -> None:
    """Say what its target would reject or not run on integers, or what is not an integer at all.

    Exit 1 if there is anything.
    """
    from onnx_intq import console, graph, intervals
    from onnx_intq.check import check
    from onnx_intq.integer_only import examine
    from onnx_intq.tensor_types import forget_types

    if target is None and not integer_only:
        raise IntqError("nothing to check; expected --target, --integer-only or both; give one")
    found = graph.read_model(model)
    proof = examine(found) if integer_only else None
    problems = check(graph.graph_from_model(found), target) if target else []
    risks: tuple[intervals.Risk, ...] | None = None
    if proof and not proof.findings:
        forget_types(found.graph)
        risks = intervals.bounds(graph.graph_from_model(found)).risks
    console.show_check(target, problems, proof, risks, as_json)
