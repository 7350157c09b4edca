"""`onnx-intq export`: write a float model."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_intq import options


@click.command(cls=options.Command)
@click.argument("source", metavar="NAME|FILE.nemo")
@options.output
@click.option("--weights", type=options.FILE, help="PyTorch state dict to load into a zoo model.")
@click.option("--opset", default=17, help="ONNX opset to write.")
@click.option("--lengths", is_flag=True, help="Add the length input and the masks it needs.")
def export(source: str, output: Path, weights: Path | None, opset: int, lengths: bool) -> None:
    """Write a model of the zoo, or a NeMo checkpoint, as float ONNX with BatchNorm kept.

    An RNN-T becomes a folder of three files: encoder, predictor and joint.
    """
    from onnx_intq.models.export import export_named

    export_named(source, output, weights=weights, opset=opset, lengths=lengths)
    click.echo(f"wrote {output}", err=True)
