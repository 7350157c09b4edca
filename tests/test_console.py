"""Reports: one JSON object, or text that a reader can use."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from onnx_intq import console, registry
from onnx_intq.evaluate import Evaluation, Hypothesis, evaluation
from onnx_intq.runtime import Timing
from onnx_intq.summary import Summary
from onnx_intq.synthesize import Result
from onnx_intq.transform import Report
from onnx_intq.verify import Drift

Captured = pytest.CaptureFixture[str]
(FOLD, INSERT) = registry.parse("fold_bn, insert_qdq")


def summary(
    drift: Drift,
    left: tuple[tuple[str, str], ...] = (),
    integer_only: tuple[str, ...] | None = None,
    wide: dict[str, float] | None = None,
) -> Summary:
    return Summary(
        quantized={"Add": 1, "Conv": 2},
        left=left,
        wide=wide or {},
        remaining=(),
        bytes_before=4_000_000,
        bytes_after=1_000_000,
        drift=drift,
        drift_on="random input",
        integer_only=integer_only,
        seconds={"load": 1.0, "passes": 0.25},
        recipe="fold_bn, insert_qdq",
        reports=(Report(FOLD, 3, (), 0.5),),
    )


def read(capsys: Captured) -> dict[str, Any]:
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out, parse_constant=pytest.fail)
    assert isinstance(found, dict)
    return found


def test_summaries_are_told(capsys: Captured) -> None:
    left = (*((f"node{i}", "why not") for i in range(5)), ("other", "because"))
    console.show_quantization(summary(Drift(0.125, 30.04), left), Path("q.onnx"), as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "quantized  3 nodes: 1 Add, 2 Conv",
        "left       5: why not (node0, node1, node2, ...)",
        "left       1: because (other)",
        "size       4.00 MB -> 1.00 MB (4.00 to 1)",
        "drift      SQNR 30.0 dB, largest 0.125, on random input",
        "seconds    1.2: load 1.0, passes 0.2",
        "recipe     fold_bn, insert_qdq",
        "wrote      q.onnx",
    ]


def test_summaries_as_json_say_everything(capsys: Captured) -> None:
    console.show_quantization(
        summary(Drift(0.125, 30.0), (("a", "b"),)), Path("q.onnx"), as_json=True
    )
    assert read(capsys) == {
        "output": "q.onnx",
        "quantized": {"Add": 1, "Conv": 2},
        "left": [["a", "b"]],
        "wide": {},
        "remaining": [],
        "bytes_before": 4_000_000,
        "bytes_after": 1_000_000,
        "drift": {"largest": 0.125, "sqnr": 30.0},
        "integer_only": None,
        "float": [],
        "seconds": {"load": 1.0, "passes": 0.25},
        "recipe": "fold_bn, insert_qdq",
        "passes": [{"pass": "fold_bn", "changes": 3}],
    }


@pytest.mark.parametrize(
    ("found", "told", "proven", "listed"),
    [
        ((), "integers   proven", True, []),
        (
            ("s: Sigmoid makes tensor(float)", "t: why"),
            "integers   not integer-only, 2 findings: s: Sigmoid makes tensor(float)",
            False,
            ["s: Sigmoid makes tensor(float)", "t: why"],
        ),
    ],
)
def test_summaries_say_whether_all_is_integer(
    capsys: Captured, found: tuple[str, ...], told: str, proven: bool, listed: list[str]
) -> None:
    done = summary(Drift(0.125, 30.0), integer_only=found)
    console.show_quantization(done, Path("q.onnx"), as_json=False)
    assert told in capsys.readouterr().out.splitlines()
    console.show_quantization(done, Path("q.onnx"), as_json=True)
    printed = read(capsys)
    assert (printed["integer_only"], printed["float"]) == (proven, listed)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_json_cannot_say_is_null(capsys: Captured, value: float) -> None:
    console.show_quantization(summary(Drift(0.0, value)), Path("q.onnx"), as_json=True)
    assert read(capsys)["drift"] == {"largest": 0.0, "sqnr": None}
    report = Report(INSERT, 1, (("a", "b"),), 0.5)
    console.show_reports([report], {"insert_qdq": Drift(value, 1.0)}, as_json=True)
    assert read(capsys) == {
        "passes": [
            {
                "pass": "insert_qdq",
                "changes": 1,
                "skipped": [["a", "b"]],
                "seconds": 0.5,
                "drift": {"largest": None, "sqnr": 1.0},
            }
        ]
    }


def test_reports_tell_the_drift_of_inexact_passes(capsys: Captured) -> None:
    reports = [Report(FOLD, 3, (), 0.004), Report(INSERT, 20, (("a", "b"),), 1.5)]
    for drifts, told in (({"insert_qdq": Drift(1.0, 42.0)}, "SQNR 42.0 dB"), ({}, "-")):
        console.show_reports(reports, drifts, as_json=False)
        rows = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
        assert rows[0].split() == ["pass", "changes", "left", "alone", "seconds", "drift"]
        assert rows[2].split(maxsplit=4) == ["fold_bn", "3", "0", "0", "exact"]
        assert rows[3].split(maxsplit=4) == ["insert_qdq", "20", "1", "1.5", told]
        assert rows[4] == "left       1: b (a)"


def test_data_of_models_without_batchnorms_is_just_written(capsys: Captured) -> None:
    result = Result(batch={}, before={}, after={}, losses=[])
    console.show_synthesis([result] * 2, Path("f.npz"), None, as_json=False)
    assert capsys.readouterr().out == "wrote 2 batches to f.npz\n"


def test_evaluations_are_told_by_split(capsys: Captured) -> None:
    said = [("clean", "a b", "a b", "a"), ("other", "a b", "b", "a")]
    hypotheses = [
        Hypothesis(audio="", split=split, reference=reference, text=text, against=against)
        for split, reference, text, against in said
    ]
    found: Evaluation = evaluation(hypotheses)
    console.show_evaluation(found, as_json=False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["clean", "1", "2", "0", "0", "100"] in rows
    assert ["all", "2", "4", "1", "25", "100"] in rows
    console.show_evaluation(found, as_json=True)
    assert read(capsys)["wer"] == 25


def test_timings_are_ratios_to_the_first(capsys: Captured) -> None:
    first = Timing(median=0.02, low=0.01, high=0.03, ratio=1.0, rounds=5)
    second = Timing(median=0.005, low=0.004, high=0.006, ratio=0.25, rounds=5)
    models = [Path("a.onnx"), Path("b.onnx")]
    console.show_timings(models, [first, second], 10.0, as_json=False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a.onnx", "20", "10", "30", "1"] in rows
    assert ["b.onnx", "5", "4", "6", "4"] in rows


def test_names_are_no_markup(capsys: Captured) -> None:
    console.table("[bold]title", ("name", "value"), [("[red]node[/red]", 1.5)])
    out = capsys.readouterr().out
    assert "[bold]title" in out
    assert "[red]node[/red]" in out


def test_tensors_of_16_bits_are_named_the_costliest_first(capsys: Captured) -> None:
    wide = {f"t{n}": 30.0 - n for n in range(12)}
    console.show_quantization(summary(Drift(0.1, 30.0), wide=wide), Path("q.onnx"), as_json=False)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("16 bits")]
    assert line.startswith("16 bits    12, with what 8 would have left: t11 19.0 dB, t10 20.0 dB")
    assert line.endswith("t2 28.0 dB, ...")
    console.show_quantization(summary(Drift(0.1, 30.0), wide=wide), Path("q.onnx"), as_json=True)
    assert read(capsys)["wide"] == wide
