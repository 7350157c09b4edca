"""Compares a `.nemo` file of a CTC model in NeMo with our export: features and log-probabilities.

NeMo is no dependency of the project; run this by hand, from the repository, in an environment of
its own (tried: nemo_toolkit 3.0.0, Python 3.11, no GPU):

    python3.11 -m venv nemoenv && . nemoenv/bin/activate
    pip install torch==2.13.0 '.[cpu,speech]'
    pip install --no-deps nemo_toolkit==3.0.0
    pip install 'hydra-core<=1.3.2' 'omegaconf<=2.3' 'lightning<=2.4.0' torchmetrics transformers \
        nv_one_logger_core nv_one_logger_training_telemetry \
        nv_one_logger_pytorch_lightning_integration datasets webdataset lhotse kaldialign \
        sentencepiece einops braceexpand pandas wrapt
    python tools/nemo_parity.py FILE.nemo MANIFEST.json

QuartzNet, Jasper and Conformer; `tools/nemo_random.py` makes such files with random weights. NeMo
3.0.0 itself cannot run Conformers whose sub-sampling is vggnet.
Without `--no-deps`, NeMo's own requirements bring CUDA. Nothing of NeMo is replaced or patched.

The reference for log-probabilities is NeMo in float64: over the 171 convolutions of QuartzNet15x5
float32 rounding alone moves NeMo's own by some 1e-4 on speech. Prints one line per comparison; exit
code 1 if any of our differences exceeds both `LIMIT` and twice that of NeMo's own float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from nemo.collections.asr.models import EncDecCTCModel, EncDecCTCModelBPE

from onnx_intq.frontend import Frontend, log_mel
from onnx_intq.manifest import read_manifest
from onnx_intq.models.export import export_named
from onnx_intq.models.nemo import Network, read_nemo
from onnx_intq.runtime import Session
from onnx_intq.speech import FRONTEND_KEY, read_audio

LIMIT = 1e-4
"""Largest difference of log-probabilities, and of normalized features, that always passes."""
RANDOM_SHAPES = ((1, 101), (3, 500))
"""Batch and frames."""
Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Largest absolute differences of log-probabilities over some input.

    Attributes:
        what: The input.
        network: Our PyTorch module from NeMo, both in float32.
        nemo: Our export in onnxruntime from NeMo, both in float32.
        exact: Our export from NeMo in float64.
        rounding: NeMo in float32 from NeMo in float64.
    """

    what: str
    network: float
    nemo: float
    exact: float
    rounding: float

    def passes(self) -> bool:
        """Whether ours are as near to NeMo as float32 allows."""
        return self.network <= LIMIT and self.exact <= max(LIMIT, 2 * self.rounding)

    def __str__(self) -> str:
        """One line."""
        return (
            f"log-probabilities, {self.what}: module from NeMo {self.network:.1e}; export from "
            f"NeMo {self.nemo:.1e}, from NeMo in float64 {self.exact:.1e} (NeMo's own rounding "
            f"{self.rounding:.1e}): {'ok' if self.passes() else 'TOO FAR'}"
        )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The same model in NeMo (float32, float64), as our PyTorch module, and as our export."""

    nemo: EncDecCTCModel
    exact: EncDecCTCModel
    network: Network
    features: int
    plain: Session
    masked: Session


def main() -> int:
    """Compare and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a .nemo file")
    parser.add_argument("manifest", type=Path, help="speech: a manifest or a folder of audio")
    parser.add_argument("--utterances", type=int, default=8, help="how many to compare")
    options = parser.parse_args()
    subject = _load(options.model)
    frontend = Frontend.from_json(subject.plain.metadata[FRONTEND_KEY])
    utterances = read_manifest(options.manifest)[: options.utterances]
    audio = [read_audio(u.audio, frontend.sample_rate) for u in utterances]
    features = [_nemo_features(subject.nemo, samples) for samples in audio]
    apart = max(_apart(log_mel(s, frontend), f) for s, f in zip(audio, features, strict=True))
    print(f"features of {len(audio)} utterances: {apart:.1e}")
    passed = apart <= LIMIT
    for found in _comparisons(subject, features):
        print(found)
        passed &= found.passes()
    return int(not passed)


def _load(model: Path) -> Subject:
    ours = read_nemo(model)
    return Subject(
        nemo=_restored(model),
        exact=_restored(model).double(),
        network=ours.network,
        features=ours.frontend.features,
        plain=_exported(model, lengths=False),
        masked=_exported(model, lengths=True),
    )


def _exported(model: Path, *, lengths: bool) -> Session:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "export.onnx"
        export_named(str(model), file, lengths=lengths)
        return Session(file, threads=1)


def _restored(model: Path) -> EncDecCTCModel:
    settings = EncDecCTCModel.restore_from(str(model), return_config=True)
    kind = EncDecCTCModelBPE if "tokenizer" in settings else EncDecCTCModel
    return kind.restore_from(str(model), map_location="cpu", strict=True).eval()


def _comparisons(subject: Subject, features: list[Floats]) -> Iterator[Comparison]:
    generator = np.random.default_rng(0)
    for batch, frames in RANDOM_SHAPES:
        shape = (batch, subject.features, frames)
        noise = generator.standard_normal(shape).astype(np.float32)
        yield _compare(subject, f"noise {shape}", [(noise, None)])
    yield _compare(subject, "speech one by one", [(one[None], None) for one in features])
    yield _compare(subject, "speech in one padded batch", [_padded(features)])


def _nemo_features(nemo: EncDecCTCModel, samples: Floats) -> Floats:
    """NeMo's features [mels, frames], the frames it pads and masks left out."""
    with torch.no_grad():
        found, lengths = nemo.preprocessor(
            input_signal=torch.from_numpy(samples)[None], length=torch.tensor([len(samples)])
        )
    return found[0, :, : int(lengths[0])].numpy()


def _padded(features: list[Floats]) -> tuple[Floats, Lengths]:
    lengths = np.array([one.shape[1] for one in features])
    batch = np.zeros((len(features), features[0].shape[0], lengths.max()), np.float32)
    for row, one in zip(batch, features, strict=True):
        row[:, : one.shape[1]] = one
    return batch, lengths


def _compare(
    subject: Subject, what: str, inputs: list[tuple[Floats, Lengths | None]]
) -> Comparison:
    """Compare over all `inputs`; of padded batches the valid frames only."""
    found = []
    for batch, lengths in inputs:
        exact, valid = _nemo_log_probs(subject.exact, batch.astype(np.float64), lengths)
        nemo, _ = _nemo_log_probs(subject.nemo, batch, lengths)
        network = _network_log_probs(subject.network, batch, lengths)
        export = _session_log_probs(subject, batch, lengths)
        pairs = ((network, nemo), (export, nemo), (export, exact), (nemo, exact))
        found.append([_apart(a[valid], b[valid]) for a, b in pairs])
    network, nemo, exact, rounding = (max(column) for column in zip(*found, strict=True))
    return Comparison(what=what, network=network, nemo=nemo, exact=exact, rounding=rounding)


def _nemo_log_probs(
    nemo: EncDecCTCModel, batch: Floats, lengths: Lengths | None
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    given = np.full(len(batch), batch.shape[2]) if lengths is None else lengths
    signal, length = torch.from_numpy(batch), torch.from_numpy(given)
    with torch.no_grad():
        found, valid, _ = nemo(processed_signal=signal, processed_signal_length=length)
    return found.numpy(), np.arange(found.shape[1]) < valid.numpy()[:, None]


def _network_log_probs(network: Network, batch: Floats, lengths: Lengths | None) -> Floats:
    signal = torch.from_numpy(batch)
    with torch.no_grad():
        if lengths is None:
            return network(signal).numpy()
        return network(signal, torch.from_numpy(lengths))[0].numpy()


def _session_log_probs(subject: Subject, batch: Floats, lengths: Lengths | None) -> Floats:
    if lengths is None:
        return subject.plain.run({"audio_signal": batch})["log_probs"]
    return subject.masked.run({"audio_signal": batch, "length": lengths})["log_probs"]


def _apart(ours: Floats, theirs: Floats) -> float:
    return float(np.abs(ours - theirs).max())


if __name__ == "__main__":
    sys.exit(main())
