"""`onnx-intq passes`: tell what passes there are."""

from __future__ import annotations

import click

from onnx_intq import options


@click.command(cls=options.Command)
@click.argument("name", required=False)
@options.as_json
def passes(name: str | None, as_json: bool) -> None:
    """List the passes, or show one with its options, what it needs and what it gives."""
    from onnx_intq import console, registry

    found = [registry.load(each) for each in ([name] if name else registry.names())]
    console.show_passes(found, name is not None, as_json)
