"""The comparison of methods below 8 bits: strings, cells and tables."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from onnx_intq.training_plan import Plan


@pytest.fixture(scope="module")
def bench_sub8bit() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "tools")
        return import_module("bench_sub8bit")


def test_a_string_depends_on_its_number_and_the_seed(bench_sub8bit: ModuleType) -> None:
    voice = bench_sub8bit.Voice(speaker="s", digits=((np.ones(800, np.float32),),) * 10)
    first, other = (list(bench_sub8bit.training_strings([voice], n, 0)) for n in (3, 2))
    assert [s.text for s in first[:2]] == [s.text for s in other]
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(first, other, strict=False))
    (changed,) = bench_sub8bit.training_strings([voice], 1, 1)
    assert not np.array_equal(changed.samples, first[0].samples)


def test_every_plan_is_a_cell_and_every_width_a_row(
    bench_sub8bit: ModuleType,
    tiny: Path,
    speech: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plans = [Plan(steps=1, bits=bits, method=m) for bits in (4, 2) for m in ("gq", "none")]
    found = list(bench_sub8bit.cells("conformer", tiny, (speech, speech), plans, tmp_path))
    assert [(cell.method, cell.bits) for cell in found[1:]] == [(p.method, p.bits) for p in plans]
    assert found[0].method == "float"
    assert all(cell.words == 4 for cell in found)
    assert all(cell.after <= cell.before for cell in found[1:])
    bench_sub8bit.print_tables(found[:-1], ("gq", "none"))
    out = capsys.readouterr().out
    assert "conformer: word errors of 4; float" in out
    assert [line.split()[0] for line in out.splitlines() if line.strip()[:1] in {"4", "2"}] == [
        "4",
        "2",
    ]
    assert out.rstrip().endswith("-")


@pytest.mark.slow
def test_it_runs_on_the_models_that_are_shipped(
    bench_sub8bit: ModuleType, assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "--steps 1 --training 4 --held-out 2 --bits 2 --method gq --model conformer --json"
    bench_sub8bit.main([*few.split(), "--assets", str(assets)])
    assert '"method": "gq"' in capsys.readouterr().out
