"""The pass protocol: what a pass is, what a run carries along, the loop that runs passes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:  # the command line imports this module, and must answer at once
    import onnx_graphsurgeon as gs

    from onnx_intq.codebook import CodedWeight
    from onnx_intq.feeds import Batch

FACTS = frozenset(
    {"bn-folded", "data", "calibrated", "reference", "quantized", "complete", "integer"}
)
"""All a pass may need or give: BatchNorm folded or named; feeds in the context; ranges there; the
float model as it was calibrated there; Q/DQ in place; every float result quantized that is to be an
integer; every operator on integers, or named."""


Range = tuple[float, float]
"""(low, high) of a tensor's values, in real units."""


class IntqError(Exception):
    """Base of every error raised on purpose; the command line prints one line, exit code 2."""


class CheckFailed(IntqError):  # noqa: N818  it reports a finding, not a fault
    """A check found what it looks for; the command line exits 1."""


class PassError(IntqError):
    """A pass was asked for something it cannot do on this model."""


@dataclass
class Context:
    """What a run carries along: facts known to hold, ranges, and nodes left alone with the reason.

    Attributes:
        facts: Strings of `FACTS` that hold for the model now.
        feeds: Batches that can be read more than once; present where the fact "data" holds.
        ranges: Tensor name -> (low, high), real units; present where the fact "calibrated" holds.
        alternatives: Tensor name -> all ranges calibration found, where one may be chosen.
        reach: Tensor name -> the range to give it in 16 bits, where nothing need be clipped.
        reference: The float model the ranges belong to, with the tensors' names of now; present
            where the fact "reference" holds. Not to be changed.
        wide: Names of tensors that need 16 bits, with the SQNR in decibels that rounding them to 8
            would leave of the network's result, as a pass has measured.
        floats: Nodes that need to stay float for such a reason: name -> the reason.
        coded: (node, which of its inputs) -> the integers its float weight came from, which it is
            to be stored as again; see `coded_weights`.
        skipped: (node, reason) pairs, in the order found.
        remaining: Like `skipped`, for what a pass had to leave although it should have gone; a
            command that sees any exits 1 unless told otherwise.
    """

    facts: set[str] = field(default_factory=set[str])
    ranges: Mapping[str, Range] = field(default_factory=dict[str, Range])
    feeds: Iterable[Batch] = ()
    alternatives: Mapping[str, Sequence[Range]] = field(default_factory=dict[str, Sequence[Range]])
    reach: Mapping[str, Range] = field(default_factory=dict[str, Range])
    reference: gs.Graph | None = None
    wide: dict[str, float] = field(default_factory=dict[str, float])
    floats: dict[str, str] = field(default_factory=dict[str, str])
    coded: Mapping[tuple[str, int], CodedWeight] = field(
        default_factory=dict[tuple[str, int], "CodedWeight"]
    )
    skipped: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    remaining: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def limits(self, tensor: str, bits: int) -> Range | None:
        """The range in which to quantize a tensor to 8 or 16 bits; None where it is unknown."""
        wide = self.reach.get(tensor) if bits > 8 else None
        return wide or self.ranges.get(tensor)

    def skip(self, node: gs.Node, why: str) -> None:
        """Note that `node` was left alone and why."""
        self.skipped.append((node.name or node.op, why))

    def remain(self, node: gs.Node, why: str) -> None:
        """Note that `node` is left although the pass exists to remove it."""
        self.skip(node, why)
        self.remaining.append((node.name or node.op, why))


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One rewrite of a whole model, in place. Its fields are its options; its file is its name."""

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The pass's name: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    def __str__(self) -> str:
        """Return text that `registry.parse` reads back; options at their defaults are left out."""
        options = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        )
        return f"{self.name}({options})" if options else self.name

    @abstractmethod
    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Rewrite `model` in place and return how many places changed."""


@dataclass(frozen=True)
class Report:
    """What one pass did: places changed, nodes left alone with the reason, seconds taken.

    `remaining` are those left alone that the pass exists to remove.
    """

    spec: Pass
    changes: int
    skipped: tuple[tuple[str, str], ...]
    seconds: float
    remaining: tuple[tuple[str, str], ...] = ()


Hook = Callable[[Pass, "gs.Graph"], None]


def run(
    model: gs.Graph, passes: Sequence[Pass], ctx: Context, after: Sequence[Hook] = ()
) -> list[Report]:
    """Run `passes` over `model` in place, in order, each followed by the hooks of `after`.

    Raises:
        PassError: A pass needs a fact no earlier pass gives (found before the model is touched), or
            a pass or hook refused; the message names the pass.
    """
    check_order(passes, ctx.facts)
    reports: list[Report] = []
    for spec in passes:
        seen, left, start = len(ctx.skipped), len(ctx.remaining), time.perf_counter()
        try:
            changes = spec.run(model, ctx)
            seconds = time.perf_counter() - start
            ctx.facts |= spec.gives
            for hook in after:
                hook(spec, model)
        except IntqError as error:
            raise PassError(f"{spec.name}: {error}") from error
        skipped, remaining = tuple(ctx.skipped[seen:]), tuple(ctx.remaining[left:])
        reports.append(Report(spec, changes, skipped, seconds, remaining))
    return reports


def check_order(passes: Sequence[Pass], facts: set[str]) -> None:
    """Refuse passes that need facts which neither hold nor are given by an earlier pass.

    Raises:
        PassError: Naming the pass and the facts.
    """
    known = set(facts)
    for spec in passes:
        if missing := spec.needs - known:
            source = "--data" if "data" in missing else "--data or --ranges"
            raise PassError(
                f"{spec.name} needs {', '.join(sorted(missing))}, which no earlier pass gives; "
                f"reorder the recipe, add a pass that does, or give {source}"
            )
        known |= spec.gives
