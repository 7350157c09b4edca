"""What `build`, `bench` and `compare` print of engines, for people and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_intq.console import SHOWN, table
from onnx_intq.engine_profile import text

if TYPE_CHECKING:
    from onnx_intq.engine_bench import Row
    from onnx_intq.engine_file import Sidecar
    from onnx_intq.engine_parity import Parity

KINDS = {"conv": "convolutions", "conv_transpose": "transposed convolutions", "matmul": "products"}
"""Kinds of products, for people."""


def show_build(sidecar: Sidecar, output: Path, *, reused: bool, note: str, as_json: bool) -> None:
    """Report an engine: what it runs on, in which precision, and what did not fuse."""
    if as_json:
        found = asdict(sidecar)
        precisions = {kind: sidecar.precisions(kind) for kind in KINDS}
        shown = {"output": str(output), "reused": reused, "note": note, "precisions": precisions}
        click.echo(json.dumps(shown | found, indent=1))
        return
    built = f"{sidecar.library} {sidecar.library_version}"
    place = sidecar.gpu or "any GPU of this kind"
    click.echo(f"built by   {built} for compute capability {sidecar.compute_capability}, {place}")
    click.echo(f"took       {sidecar.seconds:.1f} s, {sidecar.engine_bytes / 1e6:.2f} MB")
    for name, shapes in sidecar.shapes.items():
        click.echo(f"shapes     {name}={text(shapes)}")
    _show_precisions(sidecar)
    if sidecar.alone:
        click.echo(f"not fused  {len(sidecar.alone)} Q/DQ nodes: {_some(sidecar.alone)}")
    if note:
        click.echo(f"note       {note}")
    kept = "it fits what was asked for; --force builds it again"
    click.echo(
        f"kept       {output}: {kept}" if reused else f"wrote      {output} and {output.name}.json"
    )


def show_timings(rows: Sequence[Row], seconds: float, gpu: str, as_json: bool) -> None:
    """Report latencies of engines, side by side."""
    if as_json:
        entries = [asdict(row) | {"speedup": 1 / row.timing.ratio} for row in rows]
        click.echo(json.dumps({"seconds": seconds, "gpu": gpu, "engines": entries}, indent=1))
        return
    shown = [
        (
            row.engine,
            row.batch,
            "?" if row.int8 is None else f"{row.int8} of {row.products}",
            "?" if row.alone is None else row.alone,
            row.timing.median * 1e3,
            row.timing.low * 1e3,
            row.timing.high * 1e3,
            1 / row.timing.ratio,
        )
        for row in rows
    ]
    header = ("engine", "batch", "int8", "Q/DQ alone", "median ms", "10 %", "90 %", "speedup")
    rounds = rows[0].timing.rounds
    table(f"{gpu}, {seconds:g} s of audio, {rounds} rounds in turn", header, shown)


def show_parity(found: Parity, *, model: Path, engine: Path, as_json: bool) -> None:
    """Report how far an engine is from its ONNX file."""
    if as_json:
        outputs = [
            asdict(o) | {"sqnr": o.sqnr if math.isfinite(o.sqnr) else None} for o in found.outputs
        ]
        names = {"model": str(model), "engine": str(engine)}
        click.echo(json.dumps(names | asdict(found) | {"outputs": outputs}, indent=1))
        return
    rows = [(o.name, o.sqnr, o.largest, "-" if o.agree is None else o.agree) for o in found.outputs]
    batches = f"{found.batches} {'batch' if found.batches == 1 else 'batches'}"
    header = ("output", "SQNR dB", "largest error", "same label %")
    table(f"{engine} against {model}, {batches}", header, rows)
    if found.padded is not None:
        click.echo(f"padding moves the engine's outputs by at most {found.padded:.3g}")


def _show_precisions(sidecar: Sidecar) -> None:
    for kind, words in KINDS.items():
        found = sidecar.precisions(kind)
        if not found:
            continue
        if len(found) == 1 and "int8" not in found:  # a float32 or float16 engine
            ((precision, count),) = found.items()
            click.echo(f"{precision:10} {count} of {count} {words}")
            continue
        others = ", ".join(
            f"{n} {precision}" for precision, n in found.items() if precision != "int8"
        )
        rest = [p.name for p in sidecar.products if p.kind == kind and p.precision != "int8"]
        names = f": {others} ({_some(rest)})" if rest else ""
        click.echo(f"int8       {found.get('int8', 0)} of {sum(found.values())} {words}{names}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
