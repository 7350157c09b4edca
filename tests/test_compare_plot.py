import math
from pathlib import Path

import pytest

from onnx_intq.compare_plot import draw
from onnx_intq.comparison import Comparison, Errors, Row
from onnx_intq.pictures import write_png
from onnx_intq.transform import IntqError

pytest.importorskip("matplotlib")


def row(name: str, free: float, forced: float) -> Row:
    found = {
        kind: Errors(elements=1, signal=1.0, noise=10 ** (-decibels / 10))
        for kind, decibels in (("free", free), ("forced", forced))
    }
    return Row(
        name=name,
        tensor=name,
        operators=("Conv",),
        nodes=(),
        inputs=(),
        scale=None,
        zero_point=0,
        same_grid=False,
        output=False,
        **found,
    )


def drawn(monkeypatch: pytest.MonkeyPatch, *rows: Row) -> list[str]:
    """The texts below and above the picture, and those of the legend."""
    figures = []
    monkeypatch.setattr(
        "onnx_intq.compare_plot.write_png", lambda path, figure: figures.append(figure())
    )
    draw("p.png", Comparison(kinds=("float", "QDQ"), batches=1, rows=rows), "a$1.onnx", "b.onnx")
    (ax,) = figures[0].axes
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    return [ax.get_title(loc="left"), *legend, *ax.get_xlabel().split("\n")]


def test_the_worst_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(f"t{n}", 40 - n, 45 - n) for n in range(5)]
    title, *legend, axis, first, second, third, fall = drawn(monkeypatch, *rows)
    assert title == "b.onnx against a$1.onnx"
    assert [text.split(":")[0] for text in legend] == ["free-running", "teacher-forced"]
    assert axis == "tensor, in the order of computation"
    assert first == "   4  t4 (Conv): teacher-forced 41.0 dB"
    assert [second.split()[:2], third.split()[:2]] == [["3", "t3"], ["2", "t2"]]
    assert fall == "   4  t4 (Conv): free-running exact -> 36.0 dB, the deepest fall"


def test_long_names_keep_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    caption = drawn(monkeypatch, row("x" * 50 + "y" * 50, 20, 30))[-1]
    assert f"   0  ...{'x' * 10}{'y' * 50} (Conv)" in caption


def test_without_errors_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, row("a", math.inf, math.inf))[-1].startswith("tensor")


def test_what_is_lost_altogether_is_drawn(tmp_path: Path) -> None:
    lost = row("a", 0, 0)
    lost.forced.signal = lost.free.signal = 0.0
    found = Comparison(kinds=("float", "QDQ"), batches=1, rows=(lost, row("b", 20, 30)))
    draw(tmp_path / "p.png", found, "a", "b")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    with pytest.raises(IntqError, match=r"p\.png"):
        write_png(tmp_path / "none" / "p.png", Figure)
