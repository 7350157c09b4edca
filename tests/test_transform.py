import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model
from onnx_intq.transform import (
    FACTS,
    CheckFailed,
    Context,
    IntqError,
    Pass,
    PassError,
    Report,
    check_order,
    run,
)
from onnx_intq.verify import SameFunction, well_formed

TEXT = """<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y) {
    a = Relu(x)
    y = Neg(a)
}"""
FEEDS = {"x": np.array([-1.5, -0.5, 0.5, 1.5], np.float32)}


@dataclass(frozen=True, kw_only=True)
class Calibrated(Pass):
    """Gives a fact."""

    gives: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, model: gs.Graph, ctx: Context) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class Swap(Pass):
    """Replaces operators, whatever that does to the function."""

    old: str = "Relu"
    new: str = "Abs"

    needs: ClassVar[frozenset[str]] = frozenset({"calibrated"})
    gives: ClassVar[frozenset[str]] = frozenset({"quantized"})

    def run(self, model: gs.Graph, ctx: Context) -> int:
        found = [node for node in model.nodes if node.op == self.old]
        for node in model.nodes:
            if node in found:
                node.op = self.new
            else:
                ctx.skip(node, f"it is no {self.old}")
        return len(found)


@dataclass(frozen=True, kw_only=True)
class InexactSwap(Swap):
    """The same, and honest about it."""

    exact: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Leave(Pass):
    """Leaves what it exists to remove, and something else."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        ctx.remain(model.nodes[0], "it has no integer form")
        ctx.skip(model.nodes[1], "not meant")
        return 0


@dataclass(frozen=True, kw_only=True)
class Refuse(Pass):
    """Refuses."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        raise IntqError("node 'n' is odd; expected an even one; change it")


def graph() -> gs.Graph:
    return graph_from_model(onnx.parser.parse_model(TEXT))


def ops(model: gs.Graph) -> list[str]:
    return [node.op for node in model.nodes]


def test_facts_are_checked_before_the_model_is_touched() -> None:
    model, seen = graph(), list[str]()
    hook = lambda spec, _: seen.append(spec.name)  # noqa: E731
    with pytest.raises(PassError, match="needs calibrated, which no earlier pass gives; reorder"):
        run(model, [Refuse(), Swap()], Context(), [hook])
    assert not seen
    assert ops(model) == ["Relu", "Neg"]


def test_facts_come_from_the_context_or_from_earlier_passes_and_are_recorded() -> None:
    for passes, facts in ([Calibrated(), Swap()], set()), ([Swap()], {"calibrated"}):
        ctx = Context(facts=set(facts))
        run(graph(), passes, ctx)
        assert ctx.facts == {"calibrated", "quantized"}
    assert {"calibrated", "quantized"} <= FACTS


def test_the_order_can_be_checked_without_a_model() -> None:
    check_order([Calibrated(), Swap()], set())
    check_order([Swap()], {"calibrated"})
    with pytest.raises(PassError, match="test_transform needs calibrated"):
        check_order([Swap(), Calibrated()], set())


def test_reports_tell_what_each_pass_did() -> None:
    first, second = Calibrated(), Swap(new="Exp")
    ctx = Context(skipped=[("before", "the run")])
    reports = run(graph(), [first, second], ctx)
    assert [(r.spec, r.changes, r.skipped) for r in reports] == [
        (first, 0, ()),
        (second, 1, (("Neg_1", "it is no Relu"),)),
    ]
    assert all(0 <= r.seconds < 60 for r in reports)
    assert ctx.skipped == [("before", "the run"), ("Neg_1", "it is no Relu")]
    assert isinstance(reports[0], Report)


def test_reports_tell_what_each_pass_left_although_it_should_not() -> None:
    ctx = Context()
    ctx.remain(gs.Node("Relu", "before"), "the run")
    first, second, third = run(graph(), [Calibrated(), Leave(), Swap(new="Exp")], ctx)
    remaining = ("Relu_0", "it has no integer form")
    assert [r.remaining for r in (first, second, third)] == [(), (remaining,), ()]
    assert second.skipped == (remaining, ("Neg_1", "not meant"))
    assert ctx.remaining == [("before", "the run"), remaining]


def test_hooks_run_after_each_pass_in_order() -> None:
    seen: list[tuple[str, str, list[str]]] = []

    def hook(name: str) -> Callable[[Pass, gs.Graph], None]:
        return lambda spec, model: seen.append((name, str(spec), ops(model)))

    run(graph(), [Calibrated(), Swap()], Context(), [hook("a"), hook("b")])
    first, second = (seen[0][1], ["Relu", "Neg"]), (seen[2][1], ["Abs", "Neg"])
    assert [s[0] for s in seen] == ["a", "b", "a", "b"]
    assert [s[1:] for s in seen] == [first, first, second, second]


def test_a_failing_pass_or_hook_is_named() -> None:
    with pytest.raises(PassError, match=r"^test_transform: node 'n' is odd") as caught:
        run(graph(), [Refuse()], Context())
    assert isinstance(caught.value.__cause__, IntqError)

    def hook(spec: Pass, model: gs.Graph) -> None:
        raise CheckFailed("the hook's finding")

    with pytest.raises(PassError, match=r"^test_transform: the hook's finding$"):
        run(graph(), [Calibrated()], Context(), [hook])


def test_what_a_bug_raises_is_not_hidden() -> None:
    def hook(spec: Pass, model: gs.Graph) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(graph(), [Calibrated()], Context(), [hook])


def test_an_exact_pass_that_moves_an_output_is_stopped() -> None:
    model = graph()
    same = SameFunction(FEEDS)
    same.start(model)
    with pytest.raises(PassError, match=r"moved output 'y' by 1.5 > .* although it is exact"):
        run(model, [Calibrated(), Swap()], Context(), [well_formed, same])


def test_the_drift_of_an_inexact_pass_is_recorded() -> None:
    model = graph()
    same = SameFunction(FEEDS)
    same.start(model)
    run(model, [Calibrated(), InexactSwap()], Context(), [same])
    (drift,) = same.drifts.values()
    # Signal 0.5^2 + 1.5^2, and noise of the same size: the negative half is no longer cut off.
    assert (drift.largest, drift.sqnr) == (1.5, 0.0)


def test_a_pass_that_breaks_the_graph_is_stopped() -> None:
    with pytest.raises(PassError, match=r"left an invalid graph: No Op registered for Nope"):
        run(graph(), [Calibrated(), Swap(new="Nope")], Context(), [well_formed])


def test_text_names_the_file_and_only_options_that_are_set() -> None:
    assert str(Swap()) == "test_transform"
    assert str(Swap(new="Exp")) == "test_transform(new='Exp')"
    assert Swap().name == "test_transform"


def test_what_remains_is_counted_as_skipped_too() -> None:
    ctx = Context()
    ctx.remain(gs.Node("Relu", "named"), "why")
    ctx.skip(gs.Node("Relu"), "for want of a name")
    assert ctx.remaining == [("named", "why")]
    assert ctx.skipped == [("named", "why"), ("Relu", "for want of a name")]


def loaded(module: str) -> set[str]:
    """The top-level modules that importing `module` loads."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_protocol_loads_no_library() -> None:
    assert not loaded("onnx_intq.transform") & {"numpy", "onnx", "onnx_graphsurgeon", "torch"}


def test_the_command_line_loads_no_heavy_library() -> None:
    heavy = {"torch", "onnxruntime", "librosa", "soundfile", "jiwer", "matplotlib"}
    assert not loaded("onnx_intq.cli") & (heavy | {"tensorrt", "tensorrt_rtx", "scipy"})
