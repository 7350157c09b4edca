"""Processes that train one model; `test_training` runs two of them."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from onnx_intq.distributed import Group, group


def test_shares_are_the_whole() -> None:
    items = list(range(7))
    shares = [Group(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with group() as found:
        assert found == Group(0, 1)
    tensor = torch.ones(2)
    found.sum([tensor])
    assert tensor.tolist() == [1, 1]
    assert found.any(True)
    assert not found.any(False)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two processes that do the same, in place of torch's; what was ended."""
    found: list[str] = []

    def double(tensor: Tensor) -> None:
        tensor *= 2

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda _backend: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: found.append("group"))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "all_reduce", double)
    return found


def test_sums_are_over_all_processes(ended: list[str]) -> None:
    with group() as found:
        assert found == Group(1, 2)
        tensors = [torch.ones(2, 3), torch.tensor(5.0)]
        found.sum(tensors)
        assert tensors[0].tolist() == [[2] * 3] * 2
        assert tensors[1] == 10
        found.sum([])
        assert found.any(True)
        assert not found.any(False)
    assert ended == ["group"]


def test_the_group_ends_after_errors(ended: list[str]) -> None:
    with pytest.raises(RuntimeError), group():
        raise RuntimeError
    assert ended == ["group"]
