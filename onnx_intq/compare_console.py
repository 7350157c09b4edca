"""What `compare` prints: one JSON object, or a table and where the error enters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import click

from onnx_intq.compare_layers import describe
from onnx_intq.comparison import Comparison, Errors, Row
from onnx_intq.console import table


def show_comparison(
    found: Comparison, *, names: Mapping[str, str | None], worst: int | None, as_json: bool
) -> None:
    """Report a comparison.

    Args:
        found: What to report.
        names: The files: "a" and "b", "data" and "plot" if there are any.
        worst: Rows to show, the worst ones; None for all, in order.
        as_json: Print one JSON object with all.
    """
    if as_json:
        click.echo(json.dumps(dict(names) | found.to_dict(), indent=1, allow_nan=False))
        return
    rows = found.rows if worst is None else found.worst[:worst]
    shown = f"all {len(rows)} tensors" if worst is None else f"worst {len(rows)} of {_count(found)}"
    table(
        f"B {names['b']} ({found.kinds[1]}) against A {names['a']} ({found.kinds[0]}): {shown}",
        _header(found),
        [_cells(found, row) for row in rows],
    )
    for name, why in found.left_out:
        click.echo(f"left out   {name}: {why}")
    click.echo(f"data       {_data(found, names.get('data'))}")
    for row in found.outputs:
        click.echo(
            f"output     {row.name}: {row.free.decibels}, largest error {row.free.largest:.3g}"
        )
    _show_differing(found)
    click.echo(f"verdict    {verdict(found)}")
    if names.get("plot"):
        click.echo(f"wrote      {names['plot']}")


def verdict(found: Comparison) -> str:
    """Where the error enters, in one line."""
    forced, free = found.forced_entry, found.free_entry
    if free is None:
        return f"no difference: all {_count(found)} tensors are equal"
    together = f"free-running, SQNR falls most at {_name(free)}, {found.describe_fall(free)}"
    if forced is None:
        return f"on A's values all layers are exact; {together}"
    own = f"alone on A's values it gives {forced.forced.decibels}, the lowest of {_count(found)}"
    return f"the error enters at {_name(forced)}: {own}; {together}"


def _header(found: Comparison) -> Sequence[str]:
    always = ("tensor", "layer", "free dB", "fall dB", "forced dB", "free max", "forced max")
    grids = ("forced steps",) if any(row.scale is not None for row in found.rows) else ()
    return (*always, *grids, "differ ppm") if _on_one_grid(found) else (*always, *grids)


def _cells(found: Comparison, row: Row) -> Sequence[object]:
    cells: list[object] = [
        row.name,
        describe(row.operators),
        round(row.free.sqnr, 1),
        round(found.fall(row), 1) + 0.0,  # no -0
        round(row.forced.sqnr, 1),
        row.free.largest,
        row.forced.largest,
    ]
    if "forced steps" in _header(found):
        cells.append("-" if row.scale is None else round(row.forced.largest / row.scale, 2))
    if _on_one_grid(found):
        share = row.forced.differing / max(1, row.forced.elements)
        cells.append(round(1e6 * share, 1) if row.same_grid else "-")
    return cells


def _show_differing(found: Comparison) -> None:
    if not _on_one_grid(found):
        return
    kinds: dict[str, Callable[[Row], Errors]] = {
        "teacher-forced": lambda row: row.forced,
        "free-running": lambda row: row.free,
    }
    parts = []
    for kind, errors in kinds.items():
        most = max(errors(row).most_steps for row in found.rows)
        share = found.differing_per_million(errors)
        parts.append(f"{kind} {share:.4g} per million, by {most} at most")
    click.echo(f"integers   differ {'; '.join(parts)}")


def _on_one_grid(found: Comparison) -> bool:
    return any(row.same_grid for row in found.rows)


def _data(found: Comparison, data: str | None) -> str:
    if data is None:
        return "random numbers, which may leave the models' ranges; --data takes real ones"
    return f"{found.batches} {'batch' if found.batches == 1 else 'batches'} of {data}"


def _count(found: Comparison) -> int:
    return len(found.rows)


def _name(row: Row) -> str:
    return f"{row.name} ({describe(row.operators)})"
