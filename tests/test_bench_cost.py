"""The paper's Table 1 beside ours: sizes and bit operations at three widths."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from onnx_intq.models.export import export_named


@pytest.fixture(scope="module")
def bench_cost() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "tools")
        return import_module("bench_cost")


@pytest.mark.slow
def test_quartznet_is_within_3_percent_of_the_paper(bench_cost: ModuleType, tmp_path: Path) -> None:
    export_named("quartznet15x5", tmp_path / "m.onnx")
    rows = list(bench_cost.rows({"quartznet15x5": tmp_path / "m.onnx"}))
    assert [row.widths for row in rows] == [(32, 32), (8, 8), (6, 8)]
    for row in rows:
        megabytes, tbops = row.paper
        assert row.megabytes == pytest.approx(megabytes, rel=0.03)
        assert row.tbops == pytest.approx(tbops, rel=0.03)
        assert row.weights_alone == row.tbops  # no product of two activations
    assert rows[0].tbops == pytest.approx(16 * rows[1].tbops)
    first, *others = bench_cost.markdown(iter(rows)).splitlines()[2:]
    assert first.startswith("| quartznet15x5 | 32/32 | 75.5")
    assert len(others) == 2
