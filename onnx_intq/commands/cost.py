"""`onnx-intq cost`: count what a model costs, and bound its run time on a device."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_intq import options
from onnx_intq.devices import CPUS, NAMES

CORE = ("cores", "ghz")
"""Options that are about CPUs."""


@click.command(cls=options.Command)
@options.model
@options.seconds
@click.option("--batch", type=click.IntRange(min=1), default=1, help="Utterances in one run.")
@click.option("--device", type=click.Choice(NAMES), help="Bound the run time on it.")
@click.option("--cores", type=click.IntRange(min=1), default=1, help="Of a CPU, that work.")
@click.option(
    "--ghz",
    type=click.FloatRange(min=0, min_open=True),
    default=4.0,
    callback=options.finite,
    help="A CPU's highest clock.",
)
@click.option(
    "--layers", type=click.IntRange(min=1), metavar="N", help="List the N costliest products."
)
@options.as_json
@click.pass_context
def cost(
    context: click.Context,
    model: Path,
    seconds: float,
    batch: int,
    device: str | None,
    cores: int,
    ghz: float,
    layers: int | None,
    as_json: bool,
) -> None:
    """Parameters, bytes, multiplications (MACs) and bit operations (BOPs).

    With --device, also lower bounds of the run time in float32, float16 and int8. Of an RNN-T's
    folder: the encoder for all of the audio, the predictor for a label, the joint for all frames.
    """
    from onnx_intq import cost_console, devices, graph
    from onnx_intq.cost import cost
    from onnx_intq.roofline import roofline
    from onnx_intq.transducer_cost import folder_cost
    from onnx_intq.transducer_folder import is_folder

    if device not in CPUS:
        options.refuse_given(context, CORE, f"without --device {' or '.join(CPUS)}")
    chosen = devices.device(device, cores=cores, gigahertz=ghz) if device else None
    run = cost_console.Run(seconds, batch)
    if is_folder(model):
        parts = folder_cost(model, seconds=seconds, batch=batch)
        every = {
            part: (each, roofline(each, chosen) if chosen else None) for part, each in parts.items()
        }
        cost_console.show_costs(every, run, layers, as_json)
        return
    found = cost(graph.load(model), seconds=seconds, batch=batch)
    bounds = roofline(found, chosen) if chosen else None
    cost_console.show_cost(found, bounds, run, layers, as_json)
