"""What the commands of the command line share: their options, and a quiet stdout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from onnx_intq.transform import IntqError

if TYPE_CHECKING:
    from onnx_intq.frontend import Frontend
    from onnx_intq.transform import Pass

FILE = click.Path(path_type=Path)
TARGETS = click.Choice(["ort", "tensorrt"])

OBSERVER = "mse"
"""The default: it has the fewest word errors on real speech."""

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
    help="How a range is chosen from what was seen. Default: the ranges file's choice, else mse.",
)
allow_float = click.option(
    "--allow-float", is_flag=True, help="Let operators without integer form stay float."
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
    type=click.Choice(["kl", "qasr", "entropy", "random"]),
    default="kl",
    help="kl: match BatchNorm statistics; qasr: exactly the paper's recipe; entropy: for "
    "transformers without BatchNorm; random: the control.",
)


class Command(click.Command):
    """A command that keeps stdout for results: graphsurgeon would log there."""

    def invoke(self, ctx: click.Context) -> object:
        """Run it."""
        from onnx_graphsurgeon.logger import G_LOGGER

        with G_LOGGER.suppress(G_LOGGER.CRITICAL + 1):
            return super().invoke(ctx)


def finite(_ctx: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    """A callback: refuse infinity and NaN, which are in every range."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not finite.")
    return value


seconds = click.option(
    "--seconds",
    type=click.FloatRange(0, 86_400, min_open=True),
    default=10.0,
    callback=finite,
    help="Of audio in the input; at most a day.",
)


@dataclass(frozen=True)
class Overrides:
    """What `--override` asks for, by glob patterns of node names.

    Attributes:
        keep: Nodes that stay float.
        wide: Nodes whose inputs get 16 bits.
        bits: (pattern, weight bits) pairs.
    """

    keep: tuple[str, ...]
    wide: tuple[str, ...]
    bits: tuple[tuple[str, int], ...]


def split_overrides(
    texts: tuple[str, ...], smallest: int = 2, words: tuple[str, ...] = ("a16", "float")
) -> Overrides:
    """Read `NODES=BITS` options, of `smallest` to 8 bits, and `NODES=WORD` for some words.

    Raises:
        IntqError: An option is none of these.
    """
    widths = {str(bits): bits for bits in range(smallest, 9)}
    pairs = [(pattern, value) for pattern, _, value in (text.rpartition("=") for text in texts)]
    for text, (pattern, value) in zip(texts, pairs, strict=True):
        if not pattern or value not in {*words, *widths}:
            others = f", {' or '.join(f'NODES={word}' for word in words)}" if words else ""
            raise IntqError(f"--override {text!r}; expected NODES=BITS, {smallest}..8{others}")
    return Overrides(
        keep=tuple(pattern for pattern, value in pairs if value == "float"),
        wide=tuple(pattern for pattern, value in pairs if value == "a16"),
        bits=tuple((p, widths[value]) for p, value in pairs if value in widths),
    )


def split_names(text: str) -> list[str]:
    """The names in a list with commas between; "none" stands for no name."""
    return [] if text.strip() == "none" else [name.strip() for name in text.split(",")]


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


def refuse_given(context: click.Context, names: Sequence[str], why: str) -> None:
    """Refuse options of the command line that would have no effect.

    Raises:
        IntqError: One of the parameters `names` was given.
    """
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            shown = next(p.opts[-1] for p in context.command.params if p.name == name)
            advice = (
                "leave it out" if "without" in why else "expected one of the two; leave one out"
            )
            raise IntqError(f"{shown} has no effect {why}; {advice}")
