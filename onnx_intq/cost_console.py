"""What `onnx-intq cost` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import click

from onnx_intq.console import SHOWN, print_json, table
from onnx_intq.cost import Cost, NodeCost
from onnx_intq.roofline import FLOAT32, INT8, Bound, Layer, Roofline

OWN = "as stored"
"""The row of bounds with every product in the precision it has in the model."""


@dataclass(frozen=True)
class Run:
    """What is computed at once: `batch` utterances of so many seconds."""

    seconds: float
    batch: int

    def __str__(self) -> str:
        """In words."""
        several = f"{self.batch} x " if self.batch > 1 else ""
        return f"{several}{self.seconds:g} s of audio"


def show_cost(
    found: Cost, bounds: Roofline | None, run: Run, layers: int | None, as_json: bool
) -> None:
    """Report what a model costs, its bounds on a device, and its `layers` costliest products."""
    if as_json:
        print_json(asdict(run) | _to_dict(found, bounds, layers))
        return
    click.echo(f"parameters  {found.parameters / 1e6:.2f} M in {found.weight_bytes / 1e6:.2f} MB")
    click.echo(f"MACs        {found.macs / 1e9:.3f} G for {run}")
    click.echo(f"BOPs        {found.bops / 1e12:.3f} T")
    rows = [(op, t.nodes, t.macs / 1e9, t.bops / 1e12) for op, t in found.by_op.items()]
    table("", ("operator", "nodes", "GMACs", "TBOPs"), rows)
    if found.uncounted:
        click.echo(f"not counted: {', '.join(found.uncounted[:SHOWN])}")
    if bounds:
        _show_bounds(bounds, run)
    if layers and bounds:
        _show_layers(bounds, layers)
    elif layers:
        _show_nodes(found, layers)


def show_costs(
    parts: Mapping[str, tuple[Cost, Roofline | None]], run: Run, layers: int | None, as_json: bool
) -> None:
    """As `show_cost`, of several graphs by name."""
    if as_json:
        found = {part: _to_dict(*each, layers) for part, each in parts.items()}
        print_json(asdict(run) | {"parts": found})
        return
    for part, (each, bounds) in parts.items():
        click.echo(part)
        show_cost(each, bounds, run, layers, as_json=False)


def _to_dict(found: Cost, bounds: Roofline | None, layers: int | None) -> dict[str, object]:
    roofline = {"roofline": _roofline(bounds)} if bounds else {}
    listed = {"layers": _listed(found, bounds, layers)} if layers else {}
    return _counts(found) | roofline | listed


def _counts(found: Cost) -> dict[str, object]:
    return {
        "parameters": found.parameters,
        "weight_bytes": found.weight_bytes,
        "macs": found.macs,
        "bops": found.bops,
        "by_op": {op: asdict(total) for op, total in found.by_op.items()},
        "uncounted": found.uncounted,
    }


def _show_bounds(bounds: Roofline, run: Run) -> None:
    shown = {**bounds.bounds, OWN: bounds.own}
    rows = [
        (
            kind,
            each.seconds * 1e3,
            bounds.speedup(each),
            100 * each.memory_layers,
            100 * each.memory_time,
        )
        for kind, each in shown.items()
    ]
    header = ("precision", "ms", "times float32", "products %", "of the time %")
    table(f"{bounds.device.title}: at least so long for {run}; bound by memory:", header, rows)
    rates = ", ".join(f"{kind} {tops:g}" for kind, tops in bounds.device.tops.items())
    click.echo(f"peak: {rates} TOPS; memory {bounds.device.gigabytes:g} GB/s")
    click.echo(f"source: {bounds.device.source}")


def _show_layers(bounds: Roofline, count: int) -> None:
    rows = [
        (
            own.node.name,
            own.node.op,
            own.node.macs / 1e6,
            *_told(bounds.bounds[FLOAT32], number),
            *_told(bounds.bounds[INT8], number),
            own.precision,
        )
        for number, own in _costliest(bounds, count)
    ]
    header = ("product", "operator", "MMACs", f"{FLOAT32} us", "bound by", f"{INT8} us", "bound by")
    table(f"the costliest {len(rows)} of {len(bounds.own.layers)}", (*header, OWN), rows)


def _told(bound: Bound, number: int) -> tuple[float, str]:
    layer = bound.layers[number]
    return layer.seconds * 1e6, layer.bound


def _show_nodes(found: Cost, count: int) -> None:
    rows = [(n.name, n.op, n.macs / 1e6, "x".join(map(str, n.bits))) for n in _most(found, count)]
    header = ("product", "operator", "MMACs", "bits")
    table(f"the costliest {len(rows)} of {len(found.nodes)}", header, rows)


def _costliest(bounds: Roofline, count: int) -> list[tuple[int, Layer]]:
    """The number in graph order, and the product as the model has it; the slowest first."""
    return sorted(enumerate(bounds.own.layers), key=lambda item: -item[1].seconds)[:count]


def _most(found: Cost, count: int) -> Sequence[NodeCost]:
    return sorted(found.nodes, key=lambda node: -node.bops)[:count]


def _roofline(bounds: Roofline) -> dict[str, object]:
    device = bounds.device
    return {
        "device": device.name,
        "title": device.title,
        "tops": dict(device.tops),
        "gigabytes_per_second": device.gigabytes,
        "source": device.source,
        "bounds": {
            kind: {
                "seconds": each.seconds,
                "times_float32": bounds.speedup(each),
                "memory_bound_products": each.memory_layers,
                "memory_bound_time": each.memory_time,
            }
            for kind, each in {**bounds.bounds, "as_stored": bounds.own}.items()
        },
    }


def _listed(found: Cost, bounds: Roofline | None, count: int) -> list[dict[str, object]]:
    if bounds is None:
        return [asdict(node) for node in _most(found, count)]
    return [
        asdict(own.node)
        | {"precision": own.precision}
        | {
            kind: {"seconds": each.layers[number].seconds, "bound": each.layers[number].bound}
            for kind, each in bounds.bounds.items()
        }
        for number, own in _costliest(bounds, count)
    ]
