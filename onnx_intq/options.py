"""What the commands of the command line share: their options, and a quiet stdout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_intq.transform import IntqError

if TYPE_CHECKING:
    from onnx_intq.frontend import Frontend
    from onnx_intq.transform import Pass

FILE = click.Path(path_type=Path)
TARGETS = click.Choice(["ort", "tensorrt"])

model = click.argument("model", type=FILE)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
output = click.option("-o", "--output", type=FILE, required=True, help="File to write.")
seed = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    help="Of all random numbers.",
)
frontend = click.option(
    "--frontend", type=FILE, help="JSON file of the mel front end, for models that record none."
)
observer = click.option(
    "--observer",
    type=click.Choice(["minmax", "percentile", "entropy", "mse"]),
    default="mse",
    help="How a range is chosen from what was seen.",
)
allow_bn = click.option(
    "--allow-bn", is_flag=True, help="Let BatchNorms stay that cannot be folded exactly."
)
verify = click.option("--verify", is_flag=True, help="Run the model after every pass, and compare.")
device = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    help="Where synthesis runs.",
)
method = click.option(
    "--method",
    type=click.Choice(["kl", "qasr", "random"]),
    default="kl",
    help="kl: match BatchNorm statistics; qasr: exactly the paper's recipe; random: the control.",
)


class Command(click.Command):
    """A command that keeps stdout for results: graphsurgeon would log there."""

    def invoke(self, ctx: click.Context) -> object:
        """Run it."""
        from onnx_graphsurgeon.logger import G_LOGGER

        with G_LOGGER.suppress(G_LOGGER.CRITICAL + 1):
            return super().invoke(ctx)


class Group(click.Group):
    """Such commands."""

    command_class = Command


def finite(_ctx: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    """A callback: refuse infinity and NaN, which are in every range."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not finite.")
    return value


def split_overrides(texts: tuple[str, ...]) -> tuple[list[str], list[tuple[str, int]]]:
    """`NODES=float` and `NODES=BITS` options as glob patterns to keep, and (pattern, bits).

    Raises:
        IntqError: An option is neither.
    """
    keep: list[str] = []
    bits: list[tuple[str, int]] = []
    for text in texts:
        pattern, _, value = text.rpartition("=")
        if pattern and value == "float":
            keep.append(pattern)
        elif pattern and value in {"2", "3", "4", "5", "6", "7", "8"}:
            bits.append((pattern, int(value)))
        else:
            raise IntqError(f"--override {text!r}; expected NODES=BITS, 2..8, or NODES=float")
    return keep, bits


def read_recipe(text: str) -> list[Pass]:
    """The passes of a --recipe option: text, or @FILE."""
    from onnx_intq import registry
    from onnx_intq.graph import read_text

    passes = registry.parse(read_text(Path(text[1:])) if text.startswith("@") else text)
    if not passes:
        raise IntqError(f"recipe {text!r} is empty; expected passes, such as fold_bn; name some")
    return passes


def read_frontend(path: Path | None) -> Frontend | None:
    """The front end of a --frontend option."""
    from onnx_intq import speech

    return speech.read_frontend(path) if path else None
