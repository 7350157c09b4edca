"""Where a model's ranges come from: a file, real data, or data made from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_graphsurgeon as gs

from onnx_intq import ranges as ranges_file
from onnx_intq.calibrate import calibrate
from onnx_intq.feeds import Batch, digest, fingerprint, read
from onnx_intq.frontend import Frontend
from onnx_intq.graph import metadata
from onnx_intq.options import OBSERVER
from onnx_intq.progress import Tick
from onnx_intq.ranges import Ranges
from onnx_intq.samples import specs
from onnx_intq.speech import FRONTEND_KEY
from onnx_intq.transform import IntqError, Range

Bar = Callable[[str], AbstractContextManager[Tick]]
"""Makes a progress bar with a title."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the ranges come from: a file, real data, or else synthetic data.

    Attributes:
        ranges: A file `calibrate` wrote.
        data: Real feeds: .npz, folder or manifest.
        method: Of `synthesize`, where neither is given.
        seed: Of the synthetic data.
        frontend: For a manifest, where the model does not record one.
        device: For synthesis.
        fixed: Ranges of tensors that are known beforehand, in place of what is seen of them.

    Raises:
        IntqError: Both ranges and data are given.
    """

    ranges: Path | None = None
    data: Path | None = None
    method: str = "kl"
    seed: int = 0
    frontend: Frontend | None = None
    device: str = "cpu"
    fixed: Mapping[str, Range] = field(default_factory=dict[str, Range])

    def __post_init__(self) -> None:
        if self.ranges is not None and self.data is not None:
            raise IntqError(
                f"both --ranges {self.ranges} and --data {self.data}; expected one, for ranges "
                "stand in place of data; leave one out"
            )

    @property
    def is_synthetic(self) -> bool:
        """Whether data has to be made."""
        return self.ranges is None and self.data is None

    def ranges_of(
        self, graph: gs.Graph, batches: Iterable[Batch], observer: str | None, bar: Bar
    ) -> Ranges:
        """The ranges of the tensors of `graph`: from the file, else from `batches`."""
        if self.ranges is not None:
            return ranges_file.read(self.ranges)
        with bar("calibrate") as tick:
            found = calibrate(graph, batches, observer=observer or OBSERVER, progress=tick)
        fixed = {n: dict.fromkeys(found.tensors[n], limits) for n, limits in self.fixed.items()}
        return replace(found, tensors={**found.tensors, **fixed})

    def real(self, graph: gs.Graph) -> Iterable[Batch]:
        """The feeds found at `data`."""
        frontend = self.frontend or recorded_frontend(graph)
        return read(str(self.data), frontend=frontend, inputs=specs(graph))

    def batches(self, graph: gs.Graph, record: dict[str, str], bar: Bar) -> Iterable[Batch]:
        """Feeds for `graph`, which still has its BatchNorms: real ones, or made now.

        Args:
            graph: Whose inputs to feed.
            record: Metadata, which will say where the feeds are from.
            bar: Makes a progress bar.
        """
        if self.data is not None:
            batches = self.real(graph)
            record["onnx_intq.data_sha256"] = fingerprint(self.data)
            return batches
        from onnx_intq.synthesize import RECIPES, synthesize

        recipe = replace(RECIPES[self.method], seed=self.seed)
        with bar("synthesize") as tick:
            made = synthesize(graph, recipe, device=self.device, progress=tick)
            synthetic = [result.batch for result in made]
        record["onnx_intq.synthesis"] = str(recipe)
        record["onnx_intq.data_sha256"] = digest(synthetic)
        return synthetic


def recorded_frontend(graph: gs.Graph) -> Frontend | None:
    """The front end the model's metadata records, None if it records none."""
    text = metadata(graph).get(FRONTEND_KEY)
    return Frontend.from_json(text) if text else None
