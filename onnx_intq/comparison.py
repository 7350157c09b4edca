"""What `compare` finds: the errors of every tensor two models share, and the layer they enter at.

Law: errors accumulate: those of two batches are those of both together, in either order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from onnx_intq.compare_tensors import Array, Kind, Reading
from onnx_intq.transform import IntqError

REACH = 20.0
"""Decibels above the worst free-running SQNR beyond which a fall has no part in the result."""


@dataclass(kw_only=True)
class Errors:
    """The differences of a tensor of B from that of A, over all batches, in real units.

    Attributes:
        elements: How many were compared.
        signal: Sum of squares of A's values.
        noise: Sum of squares of the differences.
        largest: The largest difference.
        half_steps: Elements that differ by at least half a step of B's grid, if it has one.
        differing: Elements whose integers differ, where both are on one grid.
        most_steps: The largest difference of the integers.
    """

    elements: int = 0
    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    half_steps: int = 0
    differing: int = 0
    most_steps: int = 0

    def add(self, a: Reading, values_a: Array, b: Reading, values_b: Array) -> None:
        """Count one batch. Where A is infinite, as behind masks, there is nothing to compare.

        Raises:
            IntqError: A value is NaN.
        """
        for model, held, values in (("A", a, values_a), ("B", b, values_b)):
            if values.dtype.kind == "f" and np.isnan(values).any():
                raise IntqError(
                    f"model {model} gives NaN in tensor {held.tensor!r}; expected numbers; "
                    "check the model and the data"
                )
        real = a.real(values_a)
        if b.scale is not None and a.shares_grid(b):
            steps = np.abs(b.steps(values_b) - a.steps(values_a))
            self.differing += int(np.count_nonzero(steps))
            self.most_steps = max(self.most_steps, int(steps.max(initial=0)))
            self._add(real, steps * b.scale, b.scale)
        else:
            finite = np.isfinite(real)
            real = real[finite]
            self._add(real, np.abs(b.real(values_b)[finite] - real), b.scale)

    def _add(self, real: Array, error: Array, step: float | None) -> None:
        self.elements += real.size
        self.signal += float(np.square(real).sum())
        self.noise += float(np.square(error).sum())
        self.largest = max(self.largest, float(error.max(initial=0.0)))
        if step is not None:
            self.half_steps += int(np.count_nonzero(error >= step / 2))

    @property
    def sqnr(self) -> float:
        """Signal over noise in dB; infinity where there is no noise."""
        if not self.noise:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio else -math.inf

    @property
    def decibels(self) -> str:
        """The SQNR for people."""
        return f"{self.sqnr:.1f} dB" if self.noise else "exact"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor that both models have.

    Attributes:
        name: Of the float tensor.
        tensor: Of the tensor of B that holds it.
        operators: Of the layer that makes it: A's where A computes in float, else B's.
        nodes: Of the layer in B.
        inputs: The rows, by number, whose tensors that layer reads.
        scale: Of B's grid, None where B holds real values.
        zero_point: Of it.
        same_grid: Whether A's integers are multiples of the same scale.
        output: Whether it is an output of the model.
        free: Errors where B runs on its own values.
        forced: Errors where the layer reads A's values: those it adds itself.
    """

    name: str
    tensor: str
    operators: tuple[str, ...]
    nodes: tuple[str, ...]
    inputs: tuple[int, ...]
    scale: float | None
    zero_point: int
    same_grid: bool
    output: bool
    free: Errors = field(default_factory=Errors)
    forced: Errors = field(default_factory=Errors)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All tensors two models share, in the order B computes them.

    Attributes:
        kinds: Of A and B.
        batches: On how many they ran.
        rows: One per tensor, and grid of it.
        left_out: (tensor, reason) for those with one name that cannot be compared.
    """

    kinds: tuple[Kind, Kind]
    batches: int
    rows: tuple[Row, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def fall(self, row: Row) -> float:
        """Decibels by which free-running SQNR falls from a layer's worst input to its result.

        SQNR counts up to `REACH` above the worst of all: falls above that do not matter.
        """
        return self._counted(self.before(row)) - self._counted(row.free.sqnr)

    def before(self, row: Row) -> float:
        """The lowest free-running SQNR among the layer's inputs; infinity where all are exact."""
        return min((self.rows[number].free.sqnr for number in row.inputs), default=math.inf)

    def describe_fall(self, row: Row) -> str:
        """Free-running SQNR of the layer's worst input and of its result, such as "9 -> 8 dB"."""
        before = self.before(row)
        return f"{f'{before:.1f}' if math.isfinite(before) else 'exact'} -> {row.free.decibels}"

    @cached_property
    def worst(self) -> list[Row]:
        """The rows, those whose layers add most error for their signal first."""
        return sorted(self.rows, key=lambda row: (row.forced.sqnr, -self.fall(row)))

    @property
    def forced_entry(self) -> Row | None:
        """Where the error enters, teacher-forced: the row of lowest SQNR; None if all are exact."""
        worst = self.worst[0]
        return worst if worst.forced.noise else None

    @property
    def free_entry(self) -> Row | None:
        """Where it enters, free-running: where SQNR falls most; None if all are exact."""
        worst = max(self.rows, key=self.fall)
        return worst if worst.free.noise else None

    @property
    def first_difference(self) -> Row | None:
        """The first row that is not exact, free-running."""
        return next((row for row in self.rows if row.free.noise), None)

    @property
    def outputs(self) -> list[Row]:
        """The rows of the model's outputs."""
        return [row for row in self.rows if row.output]

    def differing_per_million(self, errors: Callable[[Row], Errors]) -> float | None:
        """Elements in a million whose integers differ, where grids agree; None where none do."""
        found = [errors(row) for row in self.rows if row.same_grid]
        elements = sum(each.elements for each in found)
        return 1e6 * sum(each.differing for each in found) / elements if elements else None

    def to_dict(self) -> dict[str, object]:
        """For JSON: `null` stands for an SQNR without noise, or without signal."""
        forced, free, first = self.forced_entry, self.free_entry, self.first_difference
        return {
            "kinds": list(self.kinds),
            "batches": self.batches,
            "tensors": [self._entry(row) for row in self.rows],
            "outputs": [row.name for row in self.outputs],
            "worst": [row.name for row in self.worst],
            "enters": {
                "teacher_forced": forced.name if forced else None,
                "free_running": free.name if free else None,
            },
            "first_difference": first.name if first else None,
            "differing_per_million": {
                "free": self.differing_per_million(lambda row: row.free),
                "forced": self.differing_per_million(lambda row: row.forced),
            },
            "left_out": [{"name": name, "why": why} for name, why in self.left_out],
        }

    @cached_property
    def _lowest(self) -> float:
        found = [row.free.sqnr for row in self.rows]
        return min((sqnr for sqnr in found if math.isfinite(sqnr)), default=0.0)

    def _counted(self, sqnr: float) -> float:
        return max(self._lowest, min(sqnr, self._lowest + REACH))

    def _entry(self, row: Row) -> dict[str, object]:
        return {
            "name": row.name,
            "tensor": row.tensor,
            "operators": list(row.operators),
            "nodes": list(row.nodes),
            "scale": row.scale,
            "zero_point": row.zero_point if row.scale is not None else None,
            "same_grid": row.same_grid,
            "output": row.output,
            "fall": self.fall(row),
            "free": _errors(row, row.free),
            "forced": _errors(row, row.forced),
        }


def steps(row: Row, errors: Errors) -> float | None:
    """The largest error in steps of B's grid; None without one."""
    return errors.largest / row.scale if row.scale is not None else None


def _errors(row: Row, errors: Errors) -> dict[str, object]:
    share = errors.half_steps / errors.elements if errors.elements else 0.0
    return {
        "sqnr": errors.sqnr if math.isfinite(errors.sqnr) else None,
        "exact": not errors.noise,
        "largest": errors.largest if math.isfinite(errors.largest) else None,
        "largest_in_steps": _finite(steps(row, errors)),
        "half_step_share": share if row.scale is not None else None,
        "differing": errors.differing if row.same_grid else None,
        "most_steps": errors.most_steps if row.same_grid else None,
        "elements": errors.elements,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
