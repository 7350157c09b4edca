"""`onnx-intq compress`: weights of less than 8 bits, packed."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_intq import options
from onnx_intq.transform import IntqError

CODING = ("codebook", "override", "data", "frontend")
"""Options that are about coding float weights."""


@click.command(cls=options.Command)
@options.model
@options.output
@click.option(
    "--bits",
    type=click.IntRange(1, 8),
    help="Of the weights of a float model. Without it, integers are packed as they are.",
)
@click.option(
    "--codebook",
    type=click.Choice(["lloyd", "mu-law", "uniform"]),
    default="lloyd",
    help="lloyd: where the error is least; mu-law: along a curve; uniform: even steps.",
)
@click.option("--data", type=options.FILE, help="Feeds by which weights are rounded.")
@click.option("--override", multiple=True, metavar="NODES=BITS|float", help="By name.")
@options.frontend
@options.as_json
def compress(
    model: Path,
    output: Path,
    bits: int | None,
    codebook: str,
    data: Path | None,
    override: tuple[str, ...],
    frontend: Path | None,
    as_json: bool,
) -> None:
    """Store weights in few bits: the file shrinks, and decodes itself by standard operators.

    Weights of a float model get --bits, all else stays float. Those of a quantized model, or of one
    that `train` has written, are packed as they are. A folder is an RNN-T.
    """
    from onnx_intq import compress_console, progress
    from onnx_intq.compress import Settings, compress
    from onnx_intq.source import Source

    if bits is None:
        options.refuse_given(click.get_current_context(), CODING, "without --bits")
    chosen = options.split_overrides(override, smallest=1)
    if chosen.wide:
        raise IntqError(
            f"--override {chosen.wide[0]}=a16 is about activations, which stay float here; "
            "expected NODES=BITS, 1..8, or NODES=float; leave it out"
        )
    settings = Settings(bits=bits, kind=codebook, keep=chosen.keep, overrides=chosen.bits)
    source = Source(data=data, frontend=options.read_frontend(frontend))
    done = compress(model, output, settings, source, bar=progress.bar)
    compress_console.show_compression(done, output, as_json)
