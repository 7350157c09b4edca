"""Scan: a body run once for every step along an axis of its inputs, with states carried over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.integer_ops.arrays import Array

Body = Callable[[Mapping[str, Array]], dict[str, Array]]
"""Inputs of a body and outer tensors by name -> its outputs by name, in order."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The node; called with its inputs, then the outer tensors that its body reads.

    Attributes:
        body: Runs a step.
        inputs: Names of the body's inputs: states, then slices of what is scanned.
        outer: Names of the outer tensors.
        scanned: How many inputs are scanned.
        axes: Along which axis each of these is.
        reverse: Whether from its end.
        output_axes: Along which axis each result that is collected is put together.
        output_reverse: Whether from its end.
    """

    body: Body
    inputs: tuple[str, ...]
    outer: tuple[str, ...]
    scanned: int
    axes: tuple[int, ...]
    reverse: tuple[bool, ...]
    output_axes: tuple[int, ...]
    output_reverse: tuple[bool, ...]

    @classmethod
    def of(cls, node: gs.Node, body: Body, outer: Sequence[str]) -> Scan:
        """The call of a node whose body is compiled."""
        attrs, scanned = node.attrs, node.attrs["num_scan_inputs"]
        results = len(node.attrs["body"].outputs) - (len(node.inputs) - scanned)

        def each(key: str, count: int) -> tuple[int, ...]:
            return tuple(attrs.get(key, [0] * count))

        return cls(
            body=body,
            inputs=tuple(t.name for t in attrs["body"].inputs),
            outer=tuple(outer),
            scanned=scanned,
            axes=each("scan_input_axes", scanned),
            reverse=tuple(map(bool, each("scan_input_directions", scanned))),
            output_axes=each("scan_output_axes", results),
            output_reverse=tuple(map(bool, each("scan_output_directions", results))),
        )

    def __call__(self, *arrays: Array) -> tuple[Array, ...]:
        """The last states, then what was collected.

        Raises:
            ValueError: There is no step, or inputs differ in length.
        """
        count = len(self.inputs)
        given, outer = arrays[:count], dict(zip(self.outer, arrays[count:], strict=True))
        states, scanned = given[: -self.scanned], given[-self.scanned :]
        steps = [
            np.flip(np.moveaxis(x, axis, 0), 0) if back else np.moveaxis(x, axis, 0)
            for x, axis, back in zip(scanned, self.axes, self.reverse, strict=True)
        ]
        if len({len(x) for x in steps}) != 1 or not len(steps[0]):
            raise ValueError(f"a Scan over {' and '.join(str(len(x)) for x in steps)} steps")
        collected: list[tuple[Array, ...]] = []
        for now in zip(*steps, strict=True):
            found = self.body(dict(zip(self.inputs, (*states, *now), strict=True)) | outer)
            states, new = tuple(found.values())[: len(states)], tuple(found.values())[len(states) :]
            collected.append(new)
        return (*states, *self._joined(collected))

    def _joined(self, collected: Sequence[tuple[Array, ...]]) -> list[Array]:
        columns = zip(*collected, strict=True)
        places = zip(columns, self.output_axes, self.output_reverse, strict=True)
        return [np.stack(column[::-1] if back else column, axis) for column, axis, back in places]
