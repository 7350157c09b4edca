import json
from dataclasses import asdict
from typing import Any

import pytest

from onnx_intq.check import Problem
from onnx_intq.check_console import Checked, show_check
from onnx_intq.console import SHOWN
from onnx_intq.engine import Parse
from onnx_intq.engine_refusals import Refusal
from onnx_intq.integer_only import Finding, Proof
from onnx_intq.intervals import Risk
from onnx_intq.transform import CheckFailed

Captured = pytest.CaptureFixture[str]
PROBLEM = Problem(node="model", rule="opset", message="too old")
PROOF = Proof(findings=(), nodes=7, tensors=12, quantizers=1, dequantizers=2, unread=())
REFUSAL = Refusal(node="a", operator="Swoosh", reason="unknown", advice="remove it")


def read(capsys: Captured) -> dict[str, Any]:
    captured = capsys.readouterr()
    assert captured.err == ""
    found: dict[str, Any] = json.loads(captured.out, parse_constant=pytest.fail)
    return found


def parse(*refusals: Refusal) -> Parse:
    return Parse(library="tensorrt-rtx", version="1.7", layers=3, refusals=refusals)


def test_long_lists_of_problems_are_cut_and_counted(capsys: Captured) -> None:
    problems = [
        Problem(node=f"n{i}", rule="scale", message="too small; raise it") for i in range(15)
    ]
    found = Checked(target="ort", problems=[*problems, PROBLEM])
    with pytest.raises(CheckFailed, match=r"^16 problems for target ort$"):
        show_check(found, as_json=False)
    out = capsys.readouterr().out
    assert "16 problems for ort" in out
    assert out.count("too small") == SHOWN
    assert out.endswith("scale: 15, opset: 1\n")
    with pytest.raises(CheckFailed):
        show_check(found, as_json=True)
    assert len(read(capsys)["problems"]) == 16
    show_check(Checked(target="ort"), as_json=True)
    assert read(capsys) == {"target": "ort", "problems": [], "warnings": []}


def test_warnings_are_told_and_fail_nothing(capsys: Captured) -> None:
    found = Checked(target="tensorrt", warnings=[PROBLEM] * 12)
    show_check(found, as_json=False)
    out = capsys.readouterr().out
    assert out.startswith("ready for tensorrt: no problem found\n12 warnings for tensorrt\n")
    assert out.count("too old") == SHOWN
    assert out.endswith("opset: 12\n")
    show_check(found, as_json=True)
    assert read(capsys)["warnings"] == [asdict(PROBLEM)] * 12


def test_the_parser_is_named_with_what_it_says(capsys: Captured) -> None:
    show_check(Checked(target="tensorrt", parse=parse()), as_json=False)
    assert capsys.readouterr().out.endswith("parser: tensorrt-rtx 1.7 takes it, 3 layers\n")
    found = Checked(target="tensorrt", problems=[PROBLEM], parse=parse(REFUSAL))
    with pytest.raises(CheckFailed, match=r"^1 problem for target tensorrt$"):
        show_check(found, as_json=False)
    assert capsys.readouterr().out.endswith("parser: tensorrt-rtx 1.7 refuses it\n")
    with pytest.raises(CheckFailed):
        show_check(found, as_json=True)
    said = {"library": "tensorrt-rtx", "version": "1.7", "layers": 3, "refusals": 1}
    assert read(capsys)["parser"] == said


def test_a_proof_says_what_was_proven(capsys: Captured) -> None:
    proof = Proof(findings=(), nodes=7, tensors=12, quantizers=1, dequantizers=2, unread=("len",))
    show_check(Checked(proof=proof, risks=()), as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        (
            "integer-only: 7 nodes, 12 tensors, all integer but the boundary "
            "(1 QuantizeLinear, 2 DequantizeLinear)"
        ),
        "float inputs that nothing reads: len",
        "overflow: none, every result stays within its type",
    ]
    show_check(Checked(proof=proof, risks=()), as_json=True)
    assert read(capsys) == {
        "integer_only": {
            "proven": True,
            "findings": [],
            "nodes": 7,
            "tensors": 12,
            "quantizers": 1,
            "dequantizers": 2,
            "unread": ["len"],
            "overflow": [],
        }
    }


def test_a_proof_without_intervals_says_nothing_of_overflow(capsys: Captured) -> None:
    show_check(Checked(proof=PROOF), as_json=False)
    assert "overflow" not in capsys.readouterr().out


def test_overflow_is_told_and_fails_nothing(capsys: Captured) -> None:
    risks = [Risk(node=f"n{i}", tensor="t", why="too wide", bounded=True) for i in range(5)]
    show_check(Checked(proof=PROOF, risks=risks), as_json=False)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "overflow: not excluded by intervals at 5 nodes, such as",
        *(f"  n{i}: too wide" for i in range(3)),
    ]
    show_check(Checked(proof=PROOF, risks=risks), as_json=True)
    found = read(capsys)["integer_only"]
    assert found["proven"] is True
    assert found["overflow"] == [asdict(risk) for risk in risks]


def test_a_failed_proof_names_the_places(capsys: Captured) -> None:
    findings = tuple(
        Finding(node=f"n{i}", tensor="t", why="makes float; expected integers") for i in range(15)
    )
    proof = Proof(
        findings=findings, nodes=20, tensors=30, quantizers=1, dequantizers=1, unread=("len",)
    )
    with pytest.raises(CheckFailed, match=r"^15 places are not integer-only$"):
        show_check(Checked(proof=proof), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "15 places are not integer-only"
    assert sum("float; expected" in line for line in lines) == SHOWN
    assert lines[-1] == "makes float: 15"
    with pytest.raises(CheckFailed, match=r"^1 problem for target ort; 15 places are not"):
        show_check(Checked(target="ort", problems=[PROBLEM], proof=proof), as_json=True)
    found = read(capsys)
    assert found.keys() == {"target", "problems", "warnings", "integer_only"}
    assert found["integer_only"]["proven"] is False
    assert found["integer_only"]["overflow"] is None
    assert found["integer_only"]["findings"][0] == asdict(findings[0])
