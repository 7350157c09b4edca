"""What passes need is made once, when first needed, and cut the recipe there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from onnx_intq import feeds
from onnx_intq.calibrate import calibrate
from onnx_intq.progress import Tick
from onnx_intq.quantize import prepared, run_recipe
from onnx_intq.source import Source
from onnx_intq.transform import Context, Pass, PassError


@contextmanager
def silent(title: str) -> Iterator[Tick]:
    yield lambda done, total: None


@dataclass(frozen=True, kw_only=True)
class Look(Pass):
    """Notes what the context holds."""

    needs: ClassVar[frozenset[str]] = frozenset({"data", "reference", "calibrated"})

    def run(self, model: gs.Graph, ctx: Context) -> int:
        assert ctx.reference is not None
        assert ctx.reference is not model
        assert ctx.ranges.keys() <= ctx.reference.tensors().keys()
        return sum(1 for _ in ctx.feeds) + sum(1 for _ in ctx.feeds)


@dataclass(frozen=True, kw_only=True)
class Early(Pass):
    """Needs data alone."""

    needs: ClassVar[frozenset[str]] = frozenset({"data"})

    def run(self, model: gs.Graph, ctx: Context) -> int:
        assert not ctx.ranges
        return len(list(ctx.feeds))


@pytest.fixture
def data(tiny: Path) -> Path:
    path, random = tiny.with_name("data.npz"), np.random.default_rng(0)
    batches = [
        {"audio_signal": random.standard_normal((2, 4, 30)).astype(np.float32)} for _ in range(3)
    ]
    feeds.write(path, batches)
    return path


def test_passes_get_data_ranges_and_the_float_model(tiny: Path, data: Path) -> None:
    reports, _ = run_recipe(tiny, None, [Early(), Look()], Source(data=data), bar=silent)
    assert [report.changes for report in reports] == [3, 6]


def test_a_ranges_file_holds_no_data(tiny: Path, data: Path) -> None:
    ranges = tiny.with_name("r.json")
    calibrate(prepared(tiny), feeds.read(data)).write(ranges)
    with pytest.raises(PassError, match="needs data, which no earlier pass gives"):
        run_recipe(tiny, None, [Look()], Source(ranges=ranges), bar=silent)


def test_run_makes_no_data_of_its_own(tiny: Path) -> None:
    with pytest.raises(PassError, match="needs calibrated, data, reference"):
        run_recipe(tiny, None, [Look()], Source(), bar=silent)
