"""The ranges of a model's activations: how they are kept in a file and chosen from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx_intq.graph import first_line, write_atomically
from onnx_intq.transform import IntqError, Range

HEADROOM = 2.0
"""How much wider than what was seen a range is, where there are 16 bits for it."""
FORMAT = "onnx_intq ranges 1"
"""The first entry of the file."""


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Ranges (low, high) in real units, low <= 0 <= high, for 8-bit quantization.

    Attributes:
        observer: The chosen method.
        tensors: Tensor name -> method -> range. Where a method's result depends on the grid, the
            method's name with "_symmetric" after it gives the range for a signed grid with zero
            point 0, the name alone that for an unsigned grid.
    """

    observer: str
    tensors: Mapping[str, Mapping[str, Range]]

    def select(self, observer: str | None = None, *, symmetric: bool = False) -> dict[str, Range]:
        """Each tensor's range.

        Args:
            observer: The method; None for the chosen one.
            symmetric: For a signed grid with zero point 0.

        Raises:
            IntqError: A tensor has no range by this method.
        """
        method = observer or self.observer
        return {
            name: _find(name, ranges, method, symmetric) for name, ranges in self.tensors.items()
        }

    def alternatives(self, *, symmetric: bool = False) -> dict[str, list[Range]]:
        """Each tensor's ranges by all methods, without repetitions, sorted.

        Args:
            symmetric: For a signed grid with zero point 0.
        """
        methods = {name.removesuffix("_symmetric") for t in self.tensors.values() for name in t}
        return {
            name: sorted({_find(name, found, m, symmetric) for m in methods if m in found})
            for name, found in self.tensors.items()
        }

    def reach(self) -> dict[str, Range]:
        """Each tensor's range for 16 bits: all that any method keeps, and `HEADROOM` more.

        One bit of sixteen is a low price for not clipping what data to come may hold: a residual
        stream's few large values are what LayerNormalization divides by.
        """
        ends = {
            name: list(zip(*found.values(), strict=True)) for name, found in self.tensors.items()
        }
        return {
            name: (HEADROOM * min(lows), HEADROOM * max(highs))
            for name, (lows, highs) in ends.items()
        }

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the file that `write` makes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Text that `read` reads back exactly; one line per tensor, sorted by name."""
        lines = ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(dict(sorted(ranges.items())))}"
            for name, ranges in sorted(self.tensors.items())
        )
        return (
            f'{{\n "format": {json.dumps(FORMAT)},\n "observer": {json.dumps(self.observer)},\n'
            f' "tensors": {{\n{lines}\n }}\n}}\n'
        )

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            IntqError: It cannot be written.
        """
        write_atomically(path, lambda target: target.write_text(self.to_json(), encoding="utf-8"))


def read(path: str | Path) -> Ranges:
    """Read a file of ranges.

    Raises:
        IntqError: It is missing, is not such a file, or holds something that is no range.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise IntqError(
            f"{path}: cannot be read: {error.strerror}; expected a file that calibrate made; "
            "check the path"
        ) from error
    except ValueError as error:
        raise IntqError(
            f"{path}: not JSON ({first_line(error)}); expected a file that calibrate made"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise IntqError(
            f"{path}: not a file of ranges; expected 'format': {FORMAT!r}; calibrate again"
        )
    observer, tensors = content.get("observer"), content.get("tensors")
    if not isinstance(observer, str) or not isinstance(tensors, dict):
        raise IntqError(
            f"{path}: no 'observer' or no 'tensors'; expected a name and a table; calibrate again"
        )
    ranges = Ranges(
        observer=observer,
        tensors={name: _read_tensor(path, name, entry) for name, entry in tensors.items()},
    )
    try:
        ranges.select()
    except IntqError as error:
        raise IntqError(f"{path}: {error}") from error
    return ranges


def _read_tensor(path: str | Path, name: str, entry: object) -> dict[str, Range]:
    if not isinstance(entry, dict):
        raise IntqError(
            f"{path}: tensor {name!r} has {json.dumps(entry)}; expected method: [low, high]"
        )
    return {method: _read_range(path, name, method, pair) for method, pair in entry.items()}


def _read_range(path: str | Path, name: str, method: str, pair: object) -> Range:
    if isinstance(pair, list) and len(pair) == 2:
        low, high = pair
        if _is_finite(low) and _is_finite(high) and low <= 0 <= high and low < high:
            return float(low), float(high)
    raise IntqError(
        f"{path}: tensor {name!r} has {method} {json.dumps(pair)}; "
        "expected [low, high], finite, with low <= 0 <= high and low < high"
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _find(name: str, ranges: Mapping[str, Range], method: str, symmetric: bool) -> Range:
    found = ranges.get(f"{method}_symmetric") if symmetric else None
    found = found or ranges.get(method)
    if found is None:
        raise IntqError(
            f"tensor {name!r} has no range by {method!r}, only by {', '.join(ranges) or 'none'}; "
            "expected one per tensor; calibrate again or choose another observer"
        )
    return found
