"""What commands print: one JSON object with `--json`, otherwise a report for people, on stdout."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_intq.progress import bar
from onnx_intq.transform import Pass, Report

if TYPE_CHECKING:
    from onnx_intq.evaluate import Evaluation
    from onnx_intq.runtime import Timing
    from onnx_intq.summary import Summary
    from onnx_intq.synthesize import Result
    from onnx_intq.verify import Drift

__all__ = ["bar"]

Rows = Sequence[Sequence[object]]
SHOWN = 10
"""Lines of a long list that a report shows; `--json` has them all."""
MEASURES = {
    "divergence": ("KL divergence", "BatchNorm"),
    "negative_entropy": ("minus the entropy of similarities", "attention"),
}
"""What synthesis makes small, and of which nodes."""


def table(title: str, header: Sequence[str], rows: Rows) -> None:
    """Print a table; columns of numbers are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(*header, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(shown.columns):
        if all(isinstance(row[index], int | float) for row in rows):
            column.justify = "right"
    for row in rows:
        shown.add_row(*(_text(value) for value in row))
    wide = None if sys.stdout.isatty() else 1000  # in a log, nothing is cut
    console = Console(width=wide, highlight=False, markup=False, soft_wrap=True)
    console.print(shown)


def show_synthesis(
    results: Sequence[Result], output: Path, plot: Path | None, as_json: bool
) -> None:
    """Report the fit of synthetic data, per BatchNorm or attention."""
    measure = results[0].measure
    found = {
        "output": str(output),
        "plot": str(plot) if plot else None,
        "batches": len(results),
        "loss": [r.losses for r in results],
        measure: {
            name: {"before": before, "after": results[0].after[name]}
            for name, before in results[0].before.items()
        },
    }
    if as_json:
        print_json(found)
        return
    first = results[0]
    worst = sorted(first.after, key=lambda name: -first.after[name])
    if worst:
        rows = [(name, first.before[name], first.after[name]) for name in worst[:SHOWN]]
        title, node = MEASURES[measure]
        table(
            f"{title} per {node}, first batch: the {len(rows)} largest of {len(worst)}",
            (node, "before", "after"),
            rows,
        )
        sums = (sum(first.before.values()), sum(first.after.values()))
        click.echo(f"sum {sums[0]:.1f} before, {sums[1]:.1f} after {len(first.losses)} steps")
    count = len(results)
    click.echo(f"wrote {count} {'batch' if count == 1 else 'batches'} to {output}")
    if plot:
        click.echo(f"wrote the picture {plot}")


def show_quantization(summary: Summary, output: Path, as_json: bool) -> None:
    """Report what `quantize` did."""
    if as_json:
        print_json({"output": str(output)} | summary.to_dict())
        return
    ops = ", ".join(f"{count} {op}" for op, count in summary.quantized.items())
    before, after = summary.bytes_before, summary.bytes_after
    click.echo(f"quantized  {sum(summary.quantized.values())} nodes: {ops}")
    show_skipped(summary.left)
    if summary.wide:
        worst = sorted(summary.wide.items(), key=lambda item: item[1])
        named = ", ".join(f"{name} {db:.1f} dB" for name, db in worst[:SHOWN])
        more = ", ..." if len(worst) > SHOWN else ""
        click.echo(f"16 bits    {len(worst)}, with what 8 would have left: {named}{more}")
    sizes = f"{before / 1e6:.2f} MB -> {after / 1e6:.2f} MB"
    click.echo(f"size       {sizes} ({before / after:.2f} to 1)")
    if summary.integer_only is not None:
        found = summary.integer_only
        proof = f"not integer-only, {len(found)} findings: {found[0]}" if found else "proven"
        click.echo(f"integers   {proof}")
    drift = summary.drift
    click.echo(
        f"drift      SQNR {drift.sqnr:.1f} dB, largest {drift.largest:.3g}, on {summary.drift_on}"
    )
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in summary.seconds.items())
    click.echo(f"seconds    {sum(summary.seconds.values()):.1f}: {stages}")
    click.echo(f"recipe     {summary.recipe}")
    click.echo(f"wrote      {output}")


def show_folder(
    done: Mapping[str, Summary | str], output: Path, data: Path | None, as_json: bool
) -> None:
    """Report what `quantize` did to the parts of an RNN-T, with `data` or noise in its place."""
    summaries = [found for found in done.values() if not isinstance(found, str)]
    specs = [report.spec for summary in summaries for report in summary.reports]
    noise = data is None and any("calibrated" in spec.needs for spec in specs)
    files = {part: output / f"{part}.onnx" for part in done}
    if as_json:
        parts = {
            part: {"kept": found} if isinstance(found, str) else found.to_dict()
            for part, found in done.items()
        }
        print_json({"output": str(output), "noise": noise, "parts": parts})
        return
    if noise:
        click.echo("data       noise; with --data, ranges are those of speech")
    for part, found in done.items():
        click.echo(f"{part}")
        if isinstance(found, str):
            click.echo(f"kept       as it is: {found}")
        else:
            show_quantization(found, files[part], as_json=False)


def show_reports(reports: Sequence[Report], drifts: Mapping[str, Drift], as_json: bool) -> None:
    """Report what each pass did."""
    if as_json:
        print_json({"passes": [_report(r, drifts) for r in reports]})
        return
    rows = [
        (r.spec.name, r.changes, len(r.skipped), round(r.seconds, 2), _drift(r, drifts))
        for r in reports
    ]
    table("", ("pass", "changes", "left alone", "seconds", "drift"), rows)
    show_skipped([entry for report in reports for entry in report.skipped])


def show_passes(found: Sequence[type[Pass]], in_full: bool, as_json: bool) -> None:
    """List passes, or show one in full."""
    entries = [_describe(each) for each in found]
    if as_json:
        print_json({"passes": entries})
    elif in_full:
        (entry,) = entries
        click.echo(f"{entry['name']}: {entry['doc']}\n")
        click.echo(f"needs    {', '.join(entry['needs']) or 'nothing'}")
        click.echo(f"gives    {', '.join(entry['gives']) or 'nothing'}")
        click.echo(f"exact    {'yes' if entry['exact'] else 'no'}")
        click.echo(f"options  {entry['options'] or 'none'}")
    else:
        rows = [(e["name"], str(e["doc"]).splitlines()[0]) for e in entries]
        table("", ("pass", "what it does"), rows)


def show_evaluation(found: Evaluation, as_json: bool) -> None:
    """Report word error rates, by split."""
    if as_json:
        print_json(found.to_dict())
        return
    scores = {**found.splits, "all": found.total}
    rows = [
        (name, s.utterances, s.words, s.errors, s.wer, "-" if s.differs is None else s.differs)
        for name, s in scores.items()
    ]
    table("", ("split", "utterances", "words", "errors", "WER %", "differs %"), rows)


def show_timings(
    models: Sequence[Path], timings: Sequence[Timing], seconds: float, as_json: bool
) -> None:
    """Report latencies, side by side."""
    if as_json:
        entries = [
            {"model": str(m), "speedup": 1 / t.ratio} | asdict(t)
            for m, t in zip(models, timings, strict=True)
        ]
        print_json({"seconds": seconds, "models": entries})
        return
    rows = [
        (str(m), t.median * 1e3, t.low * 1e3, t.high * 1e3, 1 / t.ratio)
        for m, t in zip(models, timings, strict=True)
    ]
    table(
        f"onnxruntime on the CPU, {seconds:g} s of audio, {timings[0].rounds} rounds in turn",
        ("model", "median ms", "10 %", "90 %", "speedup"),
        rows,
    )


def show_skipped(skipped: Sequence[tuple[str, str]]) -> None:
    """Report nodes that were left alone, by the reason."""
    for why, count in Counter(why for _, why in skipped).items():
        names = [name for name, reason in skipped if reason == why]
        click.echo(
            f"left       {count}: {why} ({', '.join(names[:3])}{', ...' if count > 3 else ''})"
        )


def _report(report: Report, drifts: Mapping[str, Drift]) -> dict[str, object]:
    drift = drifts.get(report.spec.name)
    return {
        "pass": str(report.spec),
        "changes": report.changes,
        "skipped": report.skipped,
        "seconds": report.seconds,
        "drift": asdict(drift) if drift else None,
    }


def _drift(report: Report, drifts: Mapping[str, Drift]) -> str:
    if report.spec.exact:
        return "exact"
    drift = drifts.get(report.spec.name)
    return f"SQNR {drift.sqnr:.1f} dB" if drift else "-"


def _describe(found: type[Pass]) -> dict[str, Any]:
    module = sys.modules[found.__module__]
    return {
        "name": found.__module__.rpartition(".")[2],
        "doc": (module.__doc__ or "").strip(),
        "needs": sorted(found.needs),
        "gives": sorted(found.gives),
        "exact": found.exact,
        "options": ", ".join(
            f"{f.name}={f.default!r}" if f.default is not MISSING else f.name for f in fields(found)
        ),
    }


def _text(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value}"


def print_json(found: Mapping[str, object]) -> None:
    """Print one JSON object; infinity and NaN become null."""
    click.echo(json.dumps(_plain(found), indent=1, default=str, allow_nan=False))


def _plain(value: object) -> object:
    """The value with null for what JSON cannot say: infinity and NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
