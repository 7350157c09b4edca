"""Patterns of node names, which passes have as options: whether they name anything.

Of several graphs that belong together, each has but some of the nodes, so a pattern need name one
in any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import onnx_graphsurgeon as gs

from onnx_intq.graph import subgraphs
from onnx_intq.summary import COMPUTING
from onnx_intq.transform import IntqError, Pass

FIELDS = ("keep", "wide", "overrides")
"""Options of passes that hold patterns, the last one (pattern, value) pairs."""


def require_matches(graph: gs.Graph, passes: Sequence[Pass]) -> None:
    """Refuse patterns that name nothing.

    Raises:
        IntqError: With the pattern, and a name that would match.
    """
    matching([graph], [passes])


def matching(graphs: Sequence[gs.Graph], passes: Sequence[Sequence[Pass]]) -> list[list[Pass]]:
    """The passes of each graph with those patterns alone that name something in it.

    Args:
        graphs: Not changed.
        passes: Of each graph.

    Raises:
        IntqError: A pattern names nothing in any graph; with the pattern, and a name.
    """
    names = [_names(graph, chosen) for graph, chosen in zip(graphs, passes, strict=True)]
    known = [name for each in names for name in each]
    for spec in (spec for chosen in passes for spec in chosen):
        for entry in (entry for field in FIELDS for entry in getattr(spec, field, ())):
            if known and not _matches(entry, known):
                raise IntqError(
                    f"no node matches {_pattern(entry)!r}; expected names or patterns of nodes "
                    f"that can be quantized, such as {known[0]!r}; correct it"
                )
    return [
        [_narrowed(spec, own) for spec in chosen] for chosen, own in zip(passes, names, strict=True)
    ]


def _names(graph: gs.Graph, passes: Sequence[Pass]) -> list[str]:
    ops = COMPUTING.union(*(getattr(spec, "operators", ()) for spec in passes))
    return [str(n.name) for sub in subgraphs(graph) for n in sub.nodes if n.op in ops]


def _narrowed(spec: Pass, names: Sequence[str]) -> Pass:
    kept = {
        field: tuple(entry for entry in getattr(spec, field) if _matches(entry, names))
        for field in FIELDS
        if getattr(spec, field, ())
    }
    return replace(spec, **kept)


def _matches(entry: Any, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, _pattern(entry)) for name in names)


def _pattern(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry[0])
