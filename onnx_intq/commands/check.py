"""`onnx-intq check`: apply a target's rules, ask NVIDIA's parser, prove a model integer-only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_intq import options
from onnx_intq.transform import IntqError

if TYPE_CHECKING:
    import onnx

    from onnx_intq.check_console import Checked


@click.command(cls=options.Command)
@options.model
@click.option("--target", type=options.TARGETS, help="Whose rules to check.")
@click.option(
    "--parser",
    is_flag=True,
    help="Have NVIDIA's own parser (tensorrt-rtx) read it, too; for target tensorrt.",
)
@click.option(
    "--integer-only", is_flag=True, help="Prove that all tensors but the boundary's are integers."
)
@options.as_json
def check(model: Path, target: str | None, parser: bool, integer_only: bool, as_json: bool) -> None:
    """Say what its target would reject or not run on integers, or what is not an integer at all.

    Exit 1 if there is anything; warnings are no failure. Of a folder, an RNN-T's, all three files
    are checked.
    """
    from onnx_intq import check_console
    from onnx_intq.transducer_folder import is_folder, part_paths

    if target is None and not integer_only:
        raise IntqError("nothing to check; expected --target, --integer-only or both; give one")
    if parser and target != "tensorrt":
        raise IntqError("--parser reads models for TensorRT; expected --target tensorrt; add it")
    if is_folder(model):
        paths = part_paths(model)
        parts = {part: _check(path, target, parser, integer_only) for part, path in paths.items()}
        check_console.show_checks(parts, as_json)
        return
    check_console.show_check(_check(model, target, parser, integer_only), as_json)


def _check(path: Path, target: str | None, parser: bool, integer_only: bool) -> Checked:
    """Check one file."""
    from onnx_intq import check_console, graph, intervals
    from onnx_intq.integer_only import examine
    from onnx_intq.packing import unpack
    from onnx_intq.tensor_types import forget_types

    found = graph.read_model(path)
    proof = examine(found) if integer_only else None
    checked = _by_rules(path, found, target, parser) if target else check_console.Checked()
    checked = replace(checked, proof=proof)
    if proof and not proof.findings:
        forget_types(found.graph)
        unpacked = graph.graph_from_model(found)
        unpack(unpacked)
        risks = intervals.bounds(unpacked).risks
        checked = replace(checked, risks=risks)
    return checked


def _by_rules(path: Path, model: onnx.ModelProto, target: str, parser: bool) -> Checked:
    """Apply the target's rules; with `parser`, ask NVIDIA's, too."""
    from onnx_intq import engine, qdq
    from onnx_intq.check import check, packed_weights, refused, warn
    from onnx_intq.check_console import Checked
    from onnx_intq.graph import graph_from_model
    from onnx_intq.packing import unpack

    graph = graph_from_model(model)
    packed = unpack(graph)  # onnxruntime decodes them, too, before it fuses anything
    parse = engine.parse(path) if parser else None
    problems = [*refused(parse), *packed_weights(packed, target), *check(graph, target)]
    return Checked(
        target=target,
        problems=problems,
        warnings=warn(graph, target),
        parse=parse,
        quantized=any(qdq.nodes(graph, *qdq.QDQ)),
    )
