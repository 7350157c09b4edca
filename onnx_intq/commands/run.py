"""`onnx-intq run`: apply passes of one's own choice."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_intq import options
from onnx_intq.transform import IntqError


@click.command(cls=options.Command)
@click.argument("recipe", metavar="'PASS, PASS(option=value)'|@FILE")
@options.model
@click.option("-o", "--output", type=options.FILE, help="File to write; not needed with --dry-run.")
@click.option("--data", type=options.FILE, help="Feeds, for passes that need data or ranges.")
@click.option("--ranges", type=options.FILE, help="Ranges from `calibrate` in place of data.")
@options.observer
@click.option("--dry-run", is_flag=True, help="Only say what each pass would change.")
@options.allow_bn
@options.allow_float
@options.verify
@options.frontend
@options.as_json
def run(
    recipe: str,
    model: Path,
    output: Path | None,
    data: Path | None,
    ranges: Path | None,
    observer: str | None,
    dry_run: bool,
    allow_bn: bool,
    allow_float: bool,
    verify: bool,
    frontend: Path | None,
    as_json: bool,
) -> None:
    """Run any pipeline of passes, ONNX in, ONNX out."""
    from onnx_intq import console
    from onnx_intq.quantize import run_recipe
    from onnx_intq.source import Source

    if output is None and not dry_run:
        raise IntqError("no output file; expected -o FILE; give one, or --dry-run")
    reports, drifts = run_recipe(
        model,
        None if dry_run else output,
        options.read_recipe(recipe),
        Source(ranges=ranges, data=data, frontend=options.read_frontend(frontend)),
        observer=observer,
        allow_bn=allow_bn,
        allow_float=allow_float,
        verify=verify,
        bar=console.bar,
    )
    console.show_reports(reports, drifts, as_json)
    if not dry_run and not as_json:
        click.echo(f"wrote {output}")
