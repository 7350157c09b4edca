"""`onnx-intq cost`: count what a model costs."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_intq import options


@click.command(cls=options.Command)
@options.model
@click.option("--seconds", default=10.0, help="Of audio.")
@options.as_json
def cost(model: Path, seconds: float, as_json: bool) -> None:
    """Parameters, bytes, multiplications (MACs) and bit operations (BOPs)."""
    from onnx_intq import console, graph
    from onnx_intq.cost import cost

    console.show_cost(cost(graph.load(model), seconds=seconds), seconds, as_json)
