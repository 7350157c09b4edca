"""Order of steps and what each frees."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onnx_intq.torch_program import Step, ordered, with_frees


def step(output: str, *inputs: str) -> Step:
    return Step(
        node=output,
        function=torch.add,
        inputs=inputs,
        reads=(None,) * len(inputs),
        outputs=(output,),
    )


@st.composite
def shuffled_graphs(draw: st.DrawFn) -> list[Step]:
    """Steps t1, t2 ... that each read from earlier ones or from the input t0, in any order."""
    size = draw(st.integers(1, 12))
    reads = [draw(st.lists(st.integers(0, i), min_size=1, max_size=3)) for i in range(size)]
    steps = [step(f"t{i + 1}", *(f"t{j}" for j in r)) for i, r in enumerate(reads)]
    return draw(st.permutations(steps))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(shuffled_graphs())
def test_every_step_comes_after_those_it_reads(steps: list[Step]) -> None:
    known = {"t0"}
    for each in ordered(steps):
        assert known.issuperset(each.inputs)
        known.update(each.outputs)
    assert known == {f"t{i}" for i in range(len(steps) + 1)}


def test_steps_in_order_stay_as_they_are() -> None:
    steps = [step("a", "x"), step("c", "x"), step("b", "a")]
    assert ordered(steps) == steps


@settings(derandomize=True, deadline=None, max_examples=100)
@given(shuffled_graphs())
def test_only_what_is_kept_is_left_at_the_end(steps: list[Step]) -> None:
    alive: set[str] = {"t0"}
    for each in with_frees(ordered(steps), keep={"t1"}):
        assert alive.issuperset(each.inputs)
        alive.update(each.outputs)
        alive.difference_update(each.frees)
    assert alive - {"t0"} == {"t1"}


def test_running_a_step_puts_outputs_and_frees_inputs() -> None:
    values: dict[str, Tensor] = {"x": torch.ones(2), "z": torch.ones(2)}
    with_frees([step("y", "x", "z")], keep={"y", "z"})[0].run(values)
    assert values.keys() == {"y", "z"}
    assert values["y"].tolist() == [2, 2]
