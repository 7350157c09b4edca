"""The table of kernel errors, and the targets it has to meet."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def bench_kernels() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "tools")
        return import_module("bench_kernels")


def test_polynomials_meet_the_targets_and_other_modes_their_figures(
    bench_kernels: ModuleType,
) -> None:
    rows = {row.name: row for row in bench_kernels.rows()}
    targets = [row for row in rows.values() if row.target is not None]
    assert len(targets) == 6
    for row in targets:
        for bits in row.bits:
            assert row.errors["poly", bits] <= row.target, row.name
    # I-BERT's constants, rounded to the steps of 8 bits: figures of the literature's algorithm.
    assert rows["exp, x <= 0"].errors["paper", 8] == pytest.approx(4.1e-2, rel=0.02)
    assert rows["exp, x <= 0"].errors["paper", 16] < 2.1e-3
    # A table of 8 bits is off by half a step of the result.
    assert rows["sigmoid"].errors["lut", 8] == pytest.approx(0.5 / 255, rel=0.05)


def test_a_mode_that_refuses_is_shown_as_a_dash(
    bench_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_kernels, "RANGE", 128.0)
    bench_kernels.print_table()
    lines = capsys.readouterr().out.splitlines()
    [sigmoid] = [line.split() for line in lines if line.startswith(" sigmoid")]
    assert sigmoid[1] == "8.0e-04"
    assert sigmoid[4] == "-"
