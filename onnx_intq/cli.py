"""The command line: `onnx-intq COMMAND`. Thin: options in, one call of the library, a report out.

Heavy libraries are imported inside the commands, so that `--help` answers at once. Exit codes:
0 done, 1 a check failed, 2 wrong use or bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys

import click

from onnx_intq import __version__
from onnx_intq.commands.bench import bench
from onnx_intq.commands.build import build
from onnx_intq.commands.calibrate import calibrate
from onnx_intq.commands.check import check
from onnx_intq.commands.compare import compare
from onnx_intq.commands.compress import compress
from onnx_intq.commands.cost import cost
from onnx_intq.commands.evaluate import evaluate
from onnx_intq.commands.export import export
from onnx_intq.commands.passes import passes
from onnx_intq.commands.quantize import quantize
from onnx_intq.commands.run import run
from onnx_intq.commands.synthesize import synthesize
from onnx_intq.commands.train import train
from onnx_intq.transform import CheckFailed, IntqError

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    "show_default": True,
}


def main() -> None:
    """Run a command; every error a user can cause is one line on stderr."""
    # Read when torch is loaded. Threads that wait actively make a shared machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        cli.main(prog_name="onnx-intq", standalone_mode=False)
    except click.Abort:
        sys.exit(_complain("interrupted; no file was left half written", 130))
    except CheckFailed as error:
        sys.exit(_complain(str(error), 1))
    except click.ClickException as error:
        sys.exit(_complain(f"{error.format_message()} Try onnx-intq --help.", 2))
    except IntqError as error:
        sys.exit(_complain(str(error), 2))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sys.exit(_complain("out of memory; give fewer or shorter batches", 2))


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; torch says so in words alone."""
    phrases = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)


def _complain(message: str, code: int) -> int:
    click.echo("error: " + " ".join(message.split()), err=True)
    return code


@click.group(context_settings=CONTEXT, no_args_is_help=False)
@click.version_option(__version__, prog_name="onnx-intq")
def cli() -> None:
    """Quantize ONNX speech models to INT8 without any data."""


for command in (
    bench,
    build,
    calibrate,
    check,
    compare,
    compress,
    cost,
    evaluate,
    export,
    passes,
    quantize,
    run,
    synthesize,
    train,
):
    cli.add_command(command)


if __name__ == "__main__":
    main()
