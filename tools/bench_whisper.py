"""The table `whisper` of bench.py: the encoder of Whisper base, scored with its float decoder.

`whisper_check.py`, beside the assets, makes the encoder from a package and scores any encoder file
on speech_dev; that takes minutes a model. The ranges come from 8 utterances of speech_train, or
from no data at all.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader

from onnx_intq import feeds
from onnx_intq.console import table
from onnx_intq.manifest import read_manifest
from onnx_intq.speech import read_audio

RATE = 16_000
UTTERANCES, STRIDE = 8, 30
"""Every 30th of speech_train."""
OURS: dict[str, tuple[str, ...]] = {
    "ours, ort, 8 utterances": ("-a", "mixed"),
    "ours, integer, 8 utterances": ("-a", "mixed", "--target", "integer"),
}
"""Options of `onnx-intq quantize` by the rows' names; equalize pays where there is real data."""
BOOST = "equalize,round_weights,correct_bias"
Quantize = Callable[..., object]
"""Runs `onnx-intq` with these arguments."""


def print_table(assets: Path, work: Path, quantize: Quantize) -> None:
    """Score float, ours and onnxruntime's."""
    script, cache = assets.parent / "tools" / "whisper_check.py", work / "whisper"
    encoder, data = cache / "encoder.onnx", cache / "feeds.npz"
    if not encoder.exists():
        subprocess.run([sys.executable, str(script), "build", str(cache)], check=True)
    if not data.exists():
        write_feeds(script, assets / "speech_train" / "manifest.json", data)
    models = {"float": encoder}
    for name, options in OURS.items():
        models[name] = cache / f"{name.replace(', ', '-').replace(' ', '-')}.onnx"
        if not models[name].exists():
            given = ("--data", data, "--boost", BOOST, *options)
            quantize("quantize", encoder, "-o", models[name], *given)
    zero = models["ours, ort, --method entropy"] = cache / "entropy.onnx"
    if not zero.exists():
        quantize("quantize", encoder, "-o", zero, "-a", "mixed", "--method", "entropy")
    peer = models["onnxruntime, 8 utterances, MatMul and Conv"] = cache / "peer.onnx"
    if not peer.exists():
        _quantize_static(encoder, peer, data)
    rows = [(name, *_score(script, cache, path, assets)) for name, path in models.items()]
    table("Whisper base, speech_dev", ("encoder", "errors", "WER %", "differs %", "MB"), rows)


def write_feeds(script: Path, manifest: Path, path: Path) -> None:
    """The features of a few utterances, as the script makes them."""
    spec = importlib.util.spec_from_file_location("whisper_check", script)
    assert spec is not None  # noqa: S101
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chosen = read_manifest(manifest)[::STRIDE][:UTTERANCES]
    feeds.write(
        path,
        ({"mel": np.asarray(module.mel(read_audio(u.audio, RATE)), np.float32)} for u in chosen),
    )


def _score(script: Path, cache: Path, model: Path, assets: Path) -> tuple[Any, ...]:
    """Word errors, as the script counts them; kept beside the model."""
    kept = model.with_suffix(".score.json")
    if not kept.exists():
        command = [sys.executable, str(script), "score", str(cache), str(model)]
        manifest = str(assets / "speech_dev" / "manifest.json")
        done = subprocess.run([*command, manifest], check=True, capture_output=True, text=True)
        kept.write_text(done.stdout.strip().splitlines()[-1])
    found = json.loads(kept.read_text())
    differs = f"{found['differs']:.2f}" if "differs" in found else ""
    size = f"{model.stat().st_size / 1e6:.1f}"
    return found["errors"], f"{found['wer']:.2f}", differs, size


def _quantize_static(source: Path, path: Path, data: Path) -> None:
    quantize_static(
        source,
        path,
        _Reader(data),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Conv"],
    )


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # the package has no types
    def __init__(self, data: Path) -> None:
        self._batches = iter(feeds.read(data))

    def get_next(self) -> dict[str, Any] | None:
        return dict(batch) if (batch := next(self._batches, None)) is not None else None
