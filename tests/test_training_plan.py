"""What the options of a training say."""

import json

import pytest

from onnx_intq.training_plan import LOWEST, Plan
from onnx_intq.transform import IntqError


def test_the_learning_rate_rises_and_falls() -> None:
    plan = Plan(steps=100)
    rates = [plan.rate_at(step) for step in range(100)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == 1
    assert LOWEST < rates[-1] < 2 * LOWEST
    assert [Plan(steps=1).rate_at(0)] == [0.5]


def test_it_is_recorded_as_json() -> None:
    assert json.loads(json.dumps(Plan(bits=3).about()))["bits"] == 3


def test_a_training_needs_a_loss() -> None:
    with pytest.raises(IntqError, match="neither a loss on transcripts nor distillation"):
        Plan(task=0, distill=0)
