"""What `onnx-intq check` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from onnx_intq.console import SHOWN, print_json, table
from onnx_intq.transform import CheckFailed

if TYPE_CHECKING:
    from onnx_intq.check import Problem
    from onnx_intq.engine import Parse
    from onnx_intq.integer_only import Proof
    from onnx_intq.intervals import Risk


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a model was checked for, and what was found.

    Attributes:
        target: Whose rules were applied; None for nobody's.
        problems: What breaks them, the parser's refusals included.
        warnings: What likely costs speed.
        parse: What NVIDIA's parser said, if it was asked.
        proof: Whether all is integer, if that was asked.
        risks: Where overflow is not excluded, if there is a proof.
        quantized: Whether it has Q/DQ nodes.
    """

    target: str | None = None
    problems: Sequence[Problem] = ()
    warnings: Sequence[Problem] = ()
    parse: Parse | None = None
    proof: Proof | None = None
    risks: Sequence[Risk] | None = None
    quantized: bool = True

    def failures(self) -> list[str]:
        """What makes the check fail: warnings and possible overflow do not.

        Intervals are wider than the truth.
        """
        failed = []
        if self.problems:
            count = len(self.problems)
            noun = "problem" if count == 1 else "problems"
            failed.append(f"{count} {noun} for target {self.target}")
        if self.proof and self.proof.findings:
            failed.append(_places(self.proof))
        return failed


def show_check(found: Checked, as_json: bool) -> None:
    """Report what a check found.

    Raises:
        CheckFailed: It found something.
    """
    if as_json:
        print_json(_to_dict(found))
    else:
        _show(found)
    if failed := found.failures():
        raise CheckFailed("; ".join(failed))


def show_checks(parts: Mapping[str, Checked], as_json: bool) -> None:
    """Report what was found in several files, by their names.

    Raises:
        CheckFailed: Something was.
    """
    if as_json:
        print_json({"parts": {part: _to_dict(found) for part, found in parts.items()}})
    else:
        for part, found in parts.items():
            click.echo(part)
            _show(found)
    if failed := [f"{part}: {why}" for part, each in parts.items() for why in each.failures()]:
        raise CheckFailed("; ".join(failed))


def _to_dict(found: Checked) -> dict[str, object]:
    said: dict[str, object] = {}
    if found.target:
        problems, warnings = ([asdict(p) for p in ps] for ps in (found.problems, found.warnings))
        said |= {"target": found.target, "problems": problems, "warnings": warnings}
    if found.parse:
        said["parser"] = {
            "library": found.parse.library,
            "version": found.parse.version,
            "layers": found.parse.layers,
            "refusals": len(found.parse.refusals),
        }
    if found.proof:
        overflow = None if found.risks is None else [asdict(r) for r in found.risks]
        proven = not found.proof.findings
        said["integer_only"] = {"proven": proven, **asdict(found.proof), "overflow": overflow}
    return said


def _show(found: Checked) -> None:
    if found.target:
        _show_problems(found.target, found.problems, found.quantized)
    if found.warnings:
        count = len(found.warnings)
        noun = "warning" if count == 1 else "warnings"
        _show_rules(f"{count} {noun} for {found.target}", found.warnings)
    if found.parse:
        _show_parse(found.parse)
    if found.proof:
        _show_proof(found.proof, found.risks)


def _show_problems(target: str, problems: Sequence[Problem], quantized: bool) -> None:
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        _show_rules(f"{count} for {target}", problems)
    else:
        note = "" if quantized else ", but nothing is quantized"
        click.echo(f"ready for {target}: no problem found{note}")


def _places(proof: Proof) -> str:
    count = len(proof.findings)
    return "1 place is not integer-only" if count == 1 else f"{count} places are not integer-only"


def _show_rules(title: str, problems: Sequence[Problem]) -> None:
    rows = [(p.rule, p.node, p.message) for p in problems[:SHOWN]]
    table(title, ("rule", "node", "what to do"), rows)
    rules = Counter(p.rule for p in problems)
    click.echo(", ".join(f"{rule}: {count}" for rule, count in rules.items()))


def _show_parse(parse: Parse) -> None:
    name = f"{parse.library} {parse.version}"
    if parse.refusals:
        click.echo(f"parser: {name} refuses it")
    else:
        click.echo(f"parser: {name} takes it, {parse.layers} layers")


def _show_proof(proof: Proof, risks: Sequence[Risk] | None) -> None:
    boundary = f"{proof.quantizers} QuantizeLinear, {proof.dequantizers} DequantizeLinear"
    if proof.findings:
        rows = [(f.node, f.tensor, f.why) for f in proof.findings[:SHOWN]]
        title = _places(proof)
        table(title, ("node", "tensor", "what was found"), rows)
        kinds = Counter(f.why.partition(";")[0] for f in proof.findings)
        click.echo(", ".join(f"{kind}: {count}" for kind, count in kinds.most_common(SHOWN)))
        return
    size = f"{proof.nodes} nodes, {proof.tensors} tensors"
    click.echo(f"integer-only: {size}, all integer but the boundary ({boundary})")
    if proof.unread:
        click.echo(f"float inputs that nothing reads: {', '.join(proof.unread)}")
    if risks:
        click.echo(f"overflow: not excluded by intervals at {len(risks)} nodes, such as")
        for risk in risks[:3]:
            click.echo(f"  {risk.node}: {risk.why}")
    elif risks is not None:
        click.echo("overflow: none, every result stays within its type")
