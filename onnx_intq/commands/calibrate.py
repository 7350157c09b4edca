"""`onnx-intq calibrate`: record the ranges of a model's activations."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_intq import options


@click.command(cls=options.Command)
@options.model
@options.output
@click.option("--data", type=options.FILE, required=True, help=".npz, folder or speech manifest.")
@options.observer
@options.frontend
def calibrate(
    model: Path, output: Path, data: Path, observer: str | None, frontend: Path | None
) -> None:
    """Record the range of every activation, by all observers, as JSON."""
    from onnx_intq import console, graph
    from onnx_intq.calibrate import calibrate
    from onnx_intq.quantize import prepared
    from onnx_intq.source import Source

    graph.check_output(output, model, data)
    net = prepared(model)
    source = Source(data=data, frontend=options.read_frontend(frontend))
    with console.bar("calibrate") as tick:
        chosen = observer or options.OBSERVER
        found = calibrate(net, source.real(net), observer=chosen, progress=tick)
    found.write(output)
    click.echo(f"wrote ranges of {len(found.tensors)} tensors to {output}", err=True)
