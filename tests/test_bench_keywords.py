"""MatchboxNet on spoken digits: its front end, and INT8 from real recordings beside float."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bench_keywords() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "tools")
        return import_module("bench_keywords")


def test_recordings_are_centred_and_as_long_as_the_model_wants(bench_keywords: ModuleType) -> None:
    tone = np.sin(np.arange(4000) * 0.3).astype(np.float32)
    features = bench_keywords.mfcc(tone)
    assert features.shape == (64, 128)
    assert features.dtype == np.float32
    assert (features[:, 101:] == 0).all()
    loud = features[0, :101] > features[0, :101].mean()
    # A quarter of a second in the middle of one.
    assert loud[40:60].all()
    assert not loud[:30].any()
    assert not loud[70:].any()


def test_labels_are_all_35_sorted(bench_keywords: ModuleType) -> None:
    assert len(bench_keywords.LABELS) == 35
    assert sorted(bench_keywords.LABELS) == bench_keywords.LABELS
    assert set(bench_keywords.DIGITS) < set(bench_keywords.LABELS)


@pytest.mark.slow
def test_int8_hears_what_float_hears(
    bench_keywords: ModuleType, assets: Path, tmp_path: Path, command: Command
) -> None:
    source, data = assets / bench_keywords.MODEL, tmp_path / "real.npz"
    bench_keywords.real_feeds(data, assets)
    models = [("float", source)]
    for target in ("ort", "integer"):
        path = tmp_path / f"{target}.onnx"
        code, _, error = command("quantize", source, "-o", path, "--target", target, "--data", data)
        assert code == 0, error
        models.append((target, path))
    exact, *others = bench_keywords.rows(models, bench_keywords.held_out(assets))
    assert exact.agreement == 1
    assert exact.accuracy > 0.85  # the front end is the right one
    for row in others:
        assert row.agreement >= 0.98
        assert row.sqnr > 25
