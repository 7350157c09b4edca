"""A picture of a comparison: SQNR of every shared tensor along the model's depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from onnx_intq.compare_layers import describe
from onnx_intq.comparison import Comparison, Row
from onnx_intq.pictures import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES = (9.0, 5.0)
NAMED = 3
"""How many of the worst tensors are named."""
LONGEST = 60
"""Characters of a name; of longer ones the end is shown."""
Kind = Literal["free", "forced"]
COLOURS: Mapping[Kind, str] = {"free": "tab:blue", "forced": "tab:orange"}
LABELS: Mapping[Kind, str] = {
    "free": "free-running: all errors so far",
    "forced": "teacher-forced: the layer's own error",
}


def draw(path: str | Path, comparison: Comparison, a: str, b: str) -> None:
    """Write the picture as PNG, whole or not at all.

    Two lines over the tensors in the order B computes them: SQNR free-running, and teacher-forced.
    Tensors without any error stand on the upper edge. The worst, teacher-forced, and the one where
    SQNR falls most, free-running, are ringed and named.

    Args:
        path: Where to write.
        comparison: What to draw.
        a: What to call the reference.
        b: What to call the other model.

    Raises:
        IntqError: The picture cannot be written.
    """
    write_png(Path(path), lambda: _figure(comparison, a, b))


def _figure(comparison: Comparison, a: str, b: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    ax = figure.subplots()
    rows = comparison.rows
    top = _top(rows)
    for kind, label in LABELS.items():
        _line(ax, [_sqnr(row, kind) for row in rows], top, kind, label)
    _frame(ax, len(rows), top, f"{b} against {a}")
    captions = ["tensor, in the order of computation"]
    for kind, row in _marked(comparison):
        _ring(ax, rows.index(row), row, kind)
        captions.append(f"{rows.index(row):4d}  {_caption(comparison, row, kind)}")
    ax.set_xlabel("\n".join(captions), loc="left", fontsize=9, parse_math=False)
    if math.isinf(top):
        ax.set_yticks([])
    return figure


def _top(rows: Sequence[Row]) -> float:
    """Where tensors without error stand, above all others; infinity where there are only such."""
    found = [s for row in rows for s in (row.free.sqnr, row.forced.sqnr) if math.isfinite(s)]
    return max(found) + max(5.0, 0.1 * (max(found) - min(found))) if found else math.inf


def _line(ax: Axes, sqnr: Sequence[float], top: float, kind: Kind, label: str) -> None:
    values = np.array(sqnr)
    numbers = np.arange(len(values))
    shown = np.where(np.isfinite(values), values, np.nan)
    colour = COLOURS[kind]
    ax.plot(numbers, shown, color=colour, marker=".", linewidth=1.2, label=label)
    exact = values == np.inf
    edge = np.full(exact.sum(), top if math.isfinite(top) else 1.0)
    size = 8 if kind == "free" else 4  # both can be seen
    ax.plot(numbers[exact], edge, color=colour, marker="^", markersize=size, linestyle="")


def _frame(ax: Axes, count: int, top: float, title: str) -> None:
    edge = top if math.isfinite(top) else 1.0
    ax.axhline(edge, color="tab:gray", linewidth=0.8, linestyle=":")
    ax.annotate(
        "exact",
        (1, edge),
        (4, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color="tab:gray",
        va="center",
    )
    ax.set_title(title, fontsize=10, loc="left", parse_math=False)
    ax.set_ylabel("SQNR [dB]")
    ax.set_xlim(-0.5, count - 0.5)
    ax.grid(alpha=0.3)
    ax.legend(loc="best", fontsize=8)


def _marked(comparison: Comparison) -> Iterator[tuple[Kind, Row]]:
    """What the captions name: the worst teacher-forced, then where free-running SQNR falls most."""
    yield from (("forced", row) for row in comparison.worst[:NAMED] if row.forced.noise)
    if comparison.free_entry is not None:
        yield "free", comparison.free_entry


def _ring(ax: Axes, number: int, row: Row, kind: Kind) -> None:
    ax.plot(number, _sqnr(row, kind), marker="o", markersize=11, fillstyle="none", color="black")


def _caption(comparison: Comparison, row: Row, kind: Kind) -> str:
    name = row.name if len(row.name) <= LONGEST else f"...{row.name[-LONGEST:]}"
    what = f"teacher-forced {row.forced.decibels}"
    if kind == "free":
        what = f"free-running {comparison.describe_fall(row)}, the deepest fall"
    return f"{name} ({describe(row.operators)}): {what}"


def _sqnr(row: Row, kind: Kind) -> float:
    return row.free.sqnr if kind == "free" else row.forced.sqnr
