"""Conformer-CTC as `export` writes it, of small sizes, from float to integers alone."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from onnx_intq.calibrate import calibrate
from onnx_intq.check import check
from onnx_intq.frontend import Frontend
from onnx_intq.graph import load, model_from_graph
from onnx_intq.integer_only import prove
from onnx_intq.interpreter import SideBySide
from onnx_intq.models.conformer import Conformer, ConformerConfig
from onnx_intq.models.conformer_block import ConformerBlockConfig
from onnx_intq.models.export import export
from onnx_intq.recipes import pipeline
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

MELS, LONGEST = 16, 64
SUBSAMPLINGS = ("striding", "vggnet")

pytestmark = pytest.mark.slow


def network(subsampling: str) -> Conformer:
    """Random weights; attention that is no mean, and BatchNorms that have seen data."""
    torch.manual_seed(0)
    block = ConformerBlockConfig(width=24, heads=3, kernel=5, expansion=2, dropout=0.0)
    net = Conformer(
        ConformerConfig(
            block=block,
            layers=2,
            labels=tuple("abcdefg"),
            features=MELS,
            subsampling=subsampling,
            channels=6,
            longest=LONGEST,
            input_dropout=0.0,
        )
    )
    with torch.no_grad():
        for name, values in net.named_parameters():
            if "pos_bias" in name:
                values.normal_(0, 0.3)
            elif "linear_q" in name or "linear_k" in name or "decoder" in name:
                values.mul_(3)
        net.train()
        for batch in feeds(seed=5, lengths=False):
            net(torch.from_numpy(batch["audio_signal"]))
    net.eval()
    return net


def feeds(seed: int, *, lengths: bool, count: int = 6) -> Iterator[dict[str, Any]]:
    """Batches of two, of 80 to 160 frames, correlated in time as speech is."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        frames = int(random.integers(80, 161))
        noise = random.normal(0, 1, (2, MELS, frames))
        signal = (noise + np.roll(noise, 1, axis=2)).astype(np.float32)
        batch = {"audio_signal": signal}
        yield batch | ({"length": np.array([frames, frames // 2])} if lengths else {})


def exported(folder: Path, subsampling: str, *, lengths: bool) -> Path:
    path = folder / f"{subsampling}{int(lengths)}.onnx"
    net = network(subsampling)
    frontend = Frontend(features=MELS)
    export(net, path, frontend=frontend, labels=net.config.labels, lengths=lengths)
    return path


def quantized(path: Path, target: str, *, lengths: bool) -> tuple[gs.Graph, Counter[str]]:
    """The model for a target, and how many places each pass rewrote."""
    passes, ctx = pipeline(target, boost=()), Context()
    model = load(path)
    split = [spec.name for spec in passes].index("insert_qdq")
    reports = run(model, passes[:split], ctx, [well_formed])
    ctx.ranges = calibrate(model, feeds(0, lengths=lengths), threads=1).select()
    ctx.facts.add("calibrated")
    reports += run(model, passes[split:], ctx, [well_formed])
    assert ctx.remaining == []
    return model, Counter({report.spec.name: report.changes for report in reports})


def outputs(model: gs.Graph, batches: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    session = Session(model_from_graph(model), threads=1)
    return [session.run(batch) for batch in batches]


def sqnr(path: Path, model: gs.Graph, *, lengths: bool) -> float:
    """Of the result, in dB; of a padded batch, of the utterance that is not padded."""
    kept = slice(None, 1) if lengths else slice(None)
    signal = noise = 0.0
    batches = [feeds(1, lengths=lengths) for _ in range(2)]
    found = [outputs(m, b) for m, b in zip((load(path), model), batches, strict=True)]
    for reference, result in zip(*found, strict=True):
        a, b = (r["log_probs"][kept].astype(np.float64) for r in (reference, result))
        signal, noise = signal + np.square(a).sum(), noise + np.square(a - b).sum()
    return float(10 * np.log10(signal / noise))


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_all_of_it_becomes_integers(tmp_path: Path, subsampling: str, *, lengths: bool) -> None:
    """Measured: 35.9 and 32.3 dB for striding, 46.2 and 47.8 dB for vggnet."""
    path = exported(tmp_path, subsampling, lengths=lengths)
    model, changes = quantized(path, "integer", lengths=lengths)
    assert prove(model) == []
    assert changes["integerize_attention"] == 2
    assert changes["integerize_layer_norm"] == 10
    # A Swish behind each first linear layer and each BatchNorm, a gate in each convolution module.
    assert changes["integerize_nonlinear"] == 8
    assert sqnr(path, model, lengths=lengths) > 30
    sides = SideBySide(model_from_graph(model))
    for batch in feeds(1, lengths=lengths, count=2):
        assert sides.run(batch) == []


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_padding_changes_no_integer(tmp_path: Path, subsampling: str) -> None:
    path = exported(tmp_path, subsampling, lengths=True)
    model, _ = quantized(path, "integer", lengths=True)
    session = Session(model_from_graph(model), threads=1)
    for batch in feeds(2, lengths=True, count=3):
        padded = session.run(batch)
        for row, length in enumerate(batch["length"]):
            signal = batch["audio_signal"][row : row + 1, :, :length]
            alone = session.run({"audio_signal": signal, "length": np.array([length])})
            (valid,) = alone["encoded_length"]
            assert padded["encoded_length"][row] == valid
            assert valid == -(-length // 4)
            np.testing.assert_array_equal(
                padded["log_probs"][row, :valid], alone["log_probs"][0, :valid]
            )


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_its_qdq_form_keeps_the_targets_rules(
    tmp_path: Path, subsampling: str, target: str, *, lengths: bool
) -> None:
    path = exported(tmp_path, subsampling, lengths=lengths)
    model, changes = quantized(path, target, lengths=lengths)
    assert check(model, target) == []
    convolutions = 2 * (2 if subsampling == "vggnet" else 1) + 2 * 3 + 1
    products = 2 * (2 + 2 + 5 + 3) + 1
    assert changes["insert_qdq"] == convolutions + products
    assert sqnr(path, model, lengths=lengths) > 25


def test_constants_are_folded_and_positions_are_bytes(tmp_path: Path) -> None:
    path = exported(tmp_path, "striding", lengths=False)
    model, changes = quantized(path, "integer", lengths=False)
    assert changes["fold_scale"] == 2 * 3 + 1  # two half feed-forwards and a query a block, input
    assert changes["fold_bias"] == 2 * 2
    tables = [
        t for t in model.tensors().values() if isinstance(t, gs.Constant) and t.values.ndim == 3
    ]
    (table,) = [t.values for t in tables if t.shape[1] == 2 * LONGEST]
    assert table.dtype == np.uint8
