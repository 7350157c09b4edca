"""Makes a `.nemo` file with NeMo's own classes: a Conformer-CTC of random weights, any size.

Run it in the environment that `tools/nemo_parity.py` describes:

    python tools/nemo_random.py SIZE FILE.nemo [--layers N] [--tokenizer FOLDER] [--onnx FILE.onnx]

SIZE is small, medium or large; FOLDER holds `tokenizer.model` and `vocab.txt` (without, the labels
are characters). `--onnx` also writes the model with NeMo's own exporter, which folds BatchNorm.
What training would have changed is random, too: norms, statistics of BatchNorm, position biases.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from nemo.collections.asr.models import EncDecCTCModel, EncDecCTCModelBPE
from omegaconf import DictConfig, OmegaConf

from onnx_intq.models.conformer import FRONTEND, SIZES, conformer_config
from onnx_intq.models.nemo_config import nemo_from_network

SEED = 0


def main() -> int:
    """Make the files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("output", type=Path, help="the .nemo file to write")
    parser.add_argument("--layers", type=int, help="fewer blocks than published")
    parser.add_argument("--subsampling", default="striding", help="striding or vggnet")
    parser.add_argument("--tied", action="store_true", help="position biases shared by all blocks")
    parser.add_argument("--tokenizer", type=Path, help="folder of a SentencePiece model")
    parser.add_argument("--onnx", type=Path, help="write ONNX with NeMo's exporter, too")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    settings = _settings(options)
    kind = EncDecCTCModelBPE if options.tokenizer else EncDecCTCModel
    model = kind(settings).eval()
    _randomize(model)
    model.save_to(str(options.output))
    if options.onnx:
        model.export(str(options.onnx))
    return 0


def _settings(options: argparse.Namespace) -> DictConfig:
    config = nemo_from_network(conformer_config(options.size), FRONTEND)
    settings = OmegaConf.create(config)
    settings.encoder.n_layers = options.layers or settings.encoder.n_layers
    settings.encoder.subsampling = options.subsampling
    settings.encoder.untie_biases = not options.tied
    if options.tokenizer:
        settings.tokenizer = {"dir": str(options.tokenizer), "type": "bpe"}
        settings.decoder.num_classes, settings.decoder.vocabulary = -1, []
    return settings


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "pos_bias" in name:
            parameter.normal_()
        elif "norm" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.2, 2)


if __name__ == "__main__":
    sys.exit(main())
