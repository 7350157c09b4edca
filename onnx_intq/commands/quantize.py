"""`onnx-intq quantize`: make an INT8 model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_intq import options

if TYPE_CHECKING:
    from onnx_intq.transform import Pass

GRIDS = ("weights", "activations", "weight_scale", "override", "boost")
PIPELINE = ("target", *GRIDS, "nonlinear", "io", "cpu")
"""Options that choose passes."""
FLOAT_ONLY = (*GRIDS, "method", "seed", "device", "allow_bn")
"""Options that are about making a float model a quantized one."""


@click.command(cls=options.Command)
@options.model
@options.output
@click.option(
    "--target",
    type=click.Choice(["ort", "tensorrt", "integer"]),
    default="ort",
    help="What will run it; integer: standard operators on integers alone.",
)
@click.option("--data", type=options.FILE, help="Real feeds in place of synthetic ones.")
@click.option("--ranges", type=options.FILE, help="Ranges from `calibrate` in place of any data.")
@options.method
@click.option("-w", "--weights", type=click.IntRange(2, 8), default=8, help="Bits of weights.")
@click.option(
    "-a",
    "--activations",
    type=click.Choice(["8", "16", "mixed"]),
    default="8",
    help="Bits of activations; mixed: 8, and more where 8 are measured to be too few.",
)
@click.option(
    "--weight-scale",
    type=click.Choice(["mse", "minmax"]),
    default="mse",
    help="mse: least error per channel; minmax: no weight clipped.",
)
@click.option(
    "--nonlinear",
    type=click.Choice(["poly", "paper", "lut", "float"]),
    default="poly",
    help="Targets integer and tensorrt: the kernels' polynomials, the papers' constants, or "
    "tables, in integers; target tensorrt: float, as they are.",
)
@click.option(
    "--io",
    type=click.Choice(["float", "int8"]),
    default="float",
    help="Target integer: what the model takes and gives.",
)
@click.option(
    "--cpu",
    type=click.Choice(["any", "vnni"]),
    default="any",
    help="Target integer: vnni is faster, but exact only on ARM and on x86 with VNNI.",
)
@click.option(
    "--boost",
    metavar="PASSES",
    help="Passes that raise accuracy by data, of equalize, choose_grids, round_weights and "
    "correct_bias, with commas between; none for none. Default: round_weights,correct_bias.",
)
@options.allow_float
@options.observer
@click.option("--override", multiple=True, metavar="NODES=BITS|a16|float", help="By name.")
@click.option("--recipe", help="The whole pipeline, or @FILE, in place of the target's.")
@options.allow_bn
@options.verify
@options.seed
@options.device
@options.frontend
@options.as_json
def quantize(
    model: Path,
    output: Path,
    target: str,
    data: Path | None,
    ranges: Path | None,
    method: str,
    weights: int,
    activations: str,
    weight_scale: str,
    nonlinear: str,
    io: str,
    cpu: str,
    boost: str | None,
    allow_float: bool,
    observer: str | None,
    override: tuple[str, ...],
    recipe: str | None,
    allow_bn: bool,
    verify: bool,
    seed: int,
    device: str,
    frontend: Path | None,
    as_json: bool,
) -> None:
    """Turn a float ONNX file into an INT8 one; without --data or --ranges, from the file alone.

    A folder is an RNN-T: encoder.onnx, predictor.onnx and joint.onnx.
    """
    from onnx_intq import console, recipes
    from onnx_intq.quantize import is_quantized, quantize
    from onnx_intq.source import Source
    from onnx_intq.transducer_folder import SCORES, is_folder
    from onnx_intq.transducer_quantize import quantize_folder

    context = click.get_current_context()
    if recipe is not None:
        options.refuse_given(context, PIPELINE, "beside --recipe, which is the whole pipeline")
    if data is not None or ranges is not None:
        options.refuse_given(context, ("method", "device"), "beside --data or --ranges")
    if target != "integer" and recipe is None:
        options.refuse_given(context, ("io", "cpu", "allow_float"), "without --target integer")
    if target == "ort" and recipe is None:
        options.refuse_given(context, ("nonlinear",), "without --target integer or tensorrt")
    chosen = options.split_overrides(override)

    def passes(part: Path) -> Sequence[Pass]:
        """The recipe for a file: the model's, or one of an RNN-T's."""
        if recipe is not None:
            return options.read_recipe(recipe)
        lowers = target == "integer" and is_quantized(part)
        if lowers:
            options.refuse_given(context, FLOAT_ONLY, "on a model that is quantized already")
        if lowers and data is None and ranges is None:
            why = "on a model that is quantized already, without --data or --ranges"
            options.refuse_given(context, ("observer", "frontend"), why)
        default = "none" if lowers or ranges is not None else ",".join(recipes.BOOST)
        return recipes.pipeline(
            target,
            weight_bits=weights,
            activation_bits=16 if activations == "16" else 8,
            mixed=activations == "mixed",
            weight_scale=weight_scale,
            keep=chosen.keep,
            wide=chosen.wide,
            overrides=chosen.bits,
            nonlinear=nonlinear,
            io=io,
            cpu=cpu,
            quantized=lowers,
            boost=options.split_names(default if boost is None else boost),
            scores=SCORES if is_folder(model) else (),
        )

    source = Source(
        ranges=ranges,
        data=data,
        method=method,
        seed=seed,
        device=device,
        frontend=options.read_frontend(frontend),
    )
    rest = {"allow_bn": allow_bn, "allow_float": allow_float, "verify": verify}
    if is_folder(model):
        options.refuse_given(context, ("method", "device"), "on an RNN-T, whose data is noise")
        done = quantize_folder(
            model, output, passes, source, observer=observer, bar=console.bar, **rest
        )
        console.show_folder(done, output, data, as_json)
        return
    summary = quantize(
        model, output, passes(model), source, observer=observer, bar=console.bar, **rest
    )
    console.show_quantization(summary, output, as_json)
