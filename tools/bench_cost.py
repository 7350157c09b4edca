"""Sizes and bit operations of the paper's three models, beside its Table 1 (Q-ASR, section 3).

    python tools/bench_cost.py NAME=FILE.onnx ...

Names are those of `PAPER`; files are exported by `onnx-intq export NAME`. All are counted for 10 s
of audio at 16 kHz: 1000 frames. The paper's size is parameters times bits, and so is ours: those
of the graph with BatchNorms folded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import onnx_graphsurgeon as gs

from onnx_intq.cost import OPERANDS, Cost, cost
from onnx_intq.quantize import prepared

PAPER = {
    "quartznet15x5": {(32, 32): (73.81, 9.48), (8, 8): (18.45, 0.61), (6, 8): (13.84, 0.46)},
    "jasper10x5dr": {(32, 32): (1208, 171), (8, 8): (302.0, 10.7), (6, 8): (226.5, 8.00)},
    "conformer-ctc-large": {
        (32, 32): (494.8, 44.0),
        (8, 8): (123.7, 2.75),
        (6, 8): (92.78, 2.06),
    },
}
"""Model -> bits of weights and of activations -> MB and TBOPs, as printed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model at one pair of widths.

    Attributes:
        model: Its name.
        widths: Bits of weights and of activations.
        megabytes: Of its parameters, in units of 10^6 bytes.
        tbops: Bit operations, in units of 10^12.
        weights_alone: The same without products of two activations: those of attention.
        paper: What Table 1 says of the first two.
    """

    model: str
    widths: tuple[int, int]
    megabytes: float
    tbops: float
    weights_alone: float
    paper: tuple[float, float]


def rows(files: Mapping[str, Path]) -> Iterator[Row]:
    """The rows of `PAPER` for the float ONNX files given by the models' names."""
    for name, file in files.items():
        graph = prepared(file)
        counted = cost(graph)
        for widths, paper in PAPER[name].items():
            yield Row(
                model=name,
                widths=widths,
                megabytes=counted.parameters * widths[0] / 8e6,
                tbops=sum(bops for bops, _ in _bops(graph, counted, widths)) / 1e12,
                weights_alone=sum(b for b, of_weight in _bops(graph, counted, widths) if of_weight)
                / 1e12,
                paper=paper,
            )


def _bops(graph: gs.Graph, counted: Cost, widths: tuple[int, int]) -> Iterator[tuple[int, bool]]:
    """Bit operations of each counted node, and whether one of its factors is a weight."""
    constants = {
        node.name: any(isinstance(node.inputs[i], gs.Constant) for i in OPERANDS[node.op])
        for node in graph.nodes
        if node.op in OPERANDS
    }
    for node in counted.nodes:
        of_weight = constants[node.name]
        yield node.macs * (widths[0] if of_weight else widths[1]) * widths[1], of_weight


def markdown(found: Iterator[Row]) -> str:
    """The rows as a table, with what they are off the paper's, in percent."""
    lines = [
        "| model | W/A | MB | paper | | TBOPs | paper | | TBOPs of weights alone | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        megabytes, tbops = row.paper
        cells = (
            row.model,
            f"{row.widths[0]}/{row.widths[1]}",
            *_beside(row.megabytes, megabytes),
            *_beside(row.tbops, tbops),
            f"{row.weights_alone:.4g}",
            f"{100 * (row.weights_alone / tbops - 1):+.1f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _beside(ours: float, paper: float) -> tuple[str, str, str]:
    return f"{ours:.4g}", f"{paper:g}", f"{100 * (ours / paper - 1):+.1f} %"


if __name__ == "__main__":
    pairs = (argument.partition("=") for argument in sys.argv[1:])
    click.echo(markdown(rows({name: Path(file) for name, _, file in pairs})))
