"""The training loop on its own: which weights are kept, and processes without a share."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from onnx_intq import training
from onnx_intq.distributed import Group
from onnx_intq.quantize import prepared
from onnx_intq.quantized_weights import QuantizedWeights
from onnx_intq.training_data import Batch, Sample, Samples
from onnx_intq.training_loop import Trainer, held_out_loss
from onnx_intq.training_network import TrainedNetwork, Values
from onnx_intq.training_plan import Plan

Command = Callable[..., tuple[int, str, str]]


class Rising:
    """A loss that depends on the weights, and is larger every time it is asked for."""

    def __init__(self) -> None:
        self._calls = 0

    def losses(self, batch: Batch, values: Values) -> Tensor:
        self._calls += 1
        total = torch.stack([v.square().mean() for v in values.values()]).sum()
        return total.expand(len(batch.frames)) * 0 + self._calls

    def probe(self, batch: Batch, values: Values, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


def samples(count: int) -> Samples:
    feed = {"audio_signal": np.zeros((1, 4, 9), np.float32)}
    return Samples([Sample(feed=feed, frames=9)] * count, 2, 0)


def trainer(path: Path, plan: Plan, group: Group, count: int = 2) -> Trainer:
    network = TrainedNetwork({"model": prepared(path)}, {}, "cpu")
    weights = QuantizedWeights(network, plan.method, dict.fromkeys(network.weights, 3))
    data = (samples(count), samples(count))
    return Trainer(weights, Rising(), data, plan, group, "cpu")


def test_the_start_is_kept_where_nothing_is_better(tiny: Path) -> None:
    found = trainer(tiny, Plan(steps=2, validate_every=1), Group())
    start = found.progress.best
    ended = found.run(tick=lambda _done, _total: None)
    assert (ended.best_step, ended.best_loss, ended.step) == (0, 1, 2)
    assert [loss for _, loss in ended.history] == [1, 3, 5]
    for key, coded in start.coded.items():
        assert np.array_equal(ended.best.coded[key].stored, coded.stored)


def test_a_checkpoint_of_the_start_is_one(tiny: Path) -> None:
    plan = Plan(steps=2)
    states: list[Mapping[str, Tensor]] = []
    found = trainer(tiny, plan, Group())
    ended = found.run(minutes=-1, save=states.append, tick=lambda _done, _total: None)
    assert ended.stopped == "-1 minutes were over"
    other = trainer(tiny, plan, Group())
    other.restore(states[0])
    assert other.progress.history == [(0, 1)]
    assert other.run(tick=lambda _done, _total: None).step == 2


@pytest.mark.parametrize("method", ["gq", "s8bqat"])
def test_a_process_without_a_share_waits_for_the_others(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    messages: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda flat: messages.append(len(flat)))
    found = trainer(tiny, Plan(steps=1, method=method), Group(1, 2), count=1)
    before = {name: t.clone() for name, t in found.state().items() if name.startswith("latent")}
    with np.errstate(all="ignore"):
        assert found._step(0)
    assert messages[0] > 100
    moved = any(not torch.equal(found.state()[name], t) for name, t in before.items())
    assert moved == (method == "s8bqat")  # by its regularizer alone


def test_the_loss_is_the_mean_over_samples() -> None:
    class Length:
        def losses(self, batch: Batch, values: Values) -> Tensor:
            return batch.frames.float()

        def probe(self, batch: Batch, values: Values, generator: torch.Generator) -> Tensor:
            raise NotImplementedError

    feeds = [{"x": np.zeros((1, n), np.float32)} for n in (1, 2, 6)]
    data = Samples([Sample(feed=f, frames=f["x"].shape[1]) for f in feeds], 2, 0)
    assert held_out_loss(Length(), data, {}, Group(), "cpu") == 3


def test_only_the_first_process_writes(
    tiny: Path,
    speech: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def second() -> Iterator[Group]:
        yield Group(1, 2)

    monkeypatch.setattr(training, "group", second)
    monkeypatch.setattr(dist, "all_reduce", lambda _flat: None)
    arguments = ("--manifest", speech, "--steps", 1, "--checkpoint", tmp_path / "c.pt")
    code, out, _ = command("train", tiny, "-o", tmp_path / "q.onnx", *arguments)
    assert (code, out) == (0, "")
    assert not (tmp_path / "q.onnx").exists()
    assert not (tmp_path / "c.pt").exists()
