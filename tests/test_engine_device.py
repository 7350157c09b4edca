from pathlib import Path

import numpy as np
import pytest
import torch

from onnx_intq.engine_device import Device, Gpu, gpu, require_gpu
from onnx_intq.transform import IntqError


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fakes"))
    from fake_gpu import pretend

    pretend(monkeypatch)


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [(None, "is built without CUDA; install"), ("12.8", "finds none; check nvidia-smi")],
)
def test_without_a_gpu_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert gpu() is None
    with pytest.raises(IntqError, match=f"^this needs an NVIDIA GPU; .* but torch .* {reason}"):
        require_gpu("this")


def test_the_gpu_is_known_by_name_and_kind(fake: None) -> None:
    assert require_gpu("this") == Gpu(name="NVIDIA Fake T4", compute_capability="7.5")


def test_arrays_are_copied_to_the_device_or_stay(fake: None) -> None:
    device = Device()
    values = np.arange(6, dtype=np.int64).reshape(2, 3).T
    for host in (False, True):
        copy = device.upload(values, host=host)
        assert copy.is_contiguous()
        assert copy.numpy().tolist() == values.tolist()
        values[0, 0] += 1
        assert copy.numpy()[0, 0] == values[0, 0] - 1
        room = device.empty((2, 0, 5), np.dtype(np.float16), host=host)
        assert (tuple(room.shape), room.dtype) == ((2, 0, 5), torch.float16)
    device.wait()


def test_work_is_timed_between_two_events(fake: None) -> None:
    done: list[int] = []
    device = Device()
    assert device.seconds(lambda: done.append(1)) > 0.0005
    assert done == [1]


def test_a_graph_records_work_once_and_replays_it(fake: None) -> None:
    import fake_gpu

    done: list[int] = []
    before = fake_gpu.Graph.replays
    replay = Device().graph(lambda: done.append(1))
    replay()
    replay()
    assert (done, fake_gpu.Graph.replays - before) == ([1], 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_times_its_own_work() -> None:
    device = Device()
    values = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    a = device.upload(values)
    assert a.is_cuda
    assert 0 < device.seconds(lambda: a @ a) < 1
    assert np.array_equal(a.cpu().numpy(), values)
