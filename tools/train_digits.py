"""Trains the model that is shipped as `models/pretrained/digits.nemo`, and makes its test set.

A small QuartzNet that hears strings of spoken English digits and writes them in letters, by CTC.
The data is the Free Spoken Digit Dataset, `fsdd/` in the folder of assets. On a CPU:

    python tools/train_digits.py train -o models/pretrained/digits.nemo
    python tools/train_digits.py test-set -o models/pretrained/digits --count 16

Same seed, steps, threads and machine: same bytes. No recording of the test set is trained on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from digit_strings import (
    RATE,
    TRAINING,
    Voice,
    draw,
    held_out_string,
    read_voices,
    record,
    write_strings,
)
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn

from onnx_intq.depthwise import depthwise_conv1d
from onnx_intq.evaluate import Evaluation, Hypothesis, evaluation
from onnx_intq.frontend import Frontend, log_mel, speech_package
from onnx_intq.graph import check_output
from onnx_intq.models.jasper_block import BlockConfig, MaskedConv1d
from onnx_intq.models.nemo import write_nemo
from onnx_intq.models.quartznet import ENGLISH, QuartzNet, QuartzNetConfig
from onnx_intq.speech import greedy
from onnx_intq.transform import IntqError

ASSETS = Path(
    os.environ.get("INTQ_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets")
)
FRONTEND = Frontend(sample_rate=RATE)
HELD_OUT_STRINGS = 200
POOL = 8
"""Batches that are drawn together and sorted by length, so that little of a batch is silence."""
MASKS, MASKED_MELS, MASKED_FRAMES = 2, 10, 10
"""SpecAugment (Park et al., Interspeech 2019): masks per axis, and their greatest widths."""
REPORTED = 100
"""Steps between two lines of progress."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train: AdamW under a one-cycle schedule (Smith and Topin, arXiv:1708.07120).

    Attributes:
        steps: Batches to train on.
        batch: Strings per batch.
        rate: Highest learning rate.
        decay: Weight decay.
        clip: Largest norm of the gradient.
        settling: Batches that BatchNorm's final statistics are the mean of.
        seed: Of the weights, the strings and their masks.
        minutes: After these training is given up.
    """

    steps: int = 3000
    batch: int = 32
    rate: float = 4e-3
    decay: float = 1e-2
    clip: float = 1.0
    settling: int = 200
    seed: int = 0
    minutes: float = 60


def digits_config() -> QuartzNetConfig:
    """QuartzNet's structure, narrow and short: 273,053 parameters, 20 ms per output frame."""
    body = [
        BlockConfig(filters=128, kernel=kernel, repeat=2, residual=True, separable=True)
        for kernel in (11, 13, 15, 17)
    ]
    first = BlockConfig(filters=128, kernel=11, stride=2, separable=True)
    wide = BlockConfig(filters=128, kernel=21, dilation=2, separable=True)
    last = BlockConfig(filters=192, kernel=1)
    return QuartzNetConfig(blocks=(first, *body, wide, last), features=FRONTEND.features)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Strings of one length, so that no frame is padding.

    Attributes:
        features: float32 [batch, mels, frames].
        targets: Labels of all strings in a row, int64 [labels].
        lengths: Labels of each string, int64 [batch].
    """

    features: Tensor
    targets: Tensor
    lengths: Tensor


class Depthwise(nn.Module):
    """A depthwise convolution that trains faster on a CPU than torch's own."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.weight = conv.weight
        (self.stride,), (self.dilation,) = conv.stride, conv.dilation
        self.margin = self.dilation * (len(conv.weight[0, 0]) - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, time] to [batch, channels, time']."""
        margins = (self.margin, self.margin)
        return depthwise_conv1d(x, self.weight, None, self.stride, margins, self.dilation)


def quicken(network: QuartzNet) -> QuartzNet:
    """Replace the depthwise convolutions, in place and under the same parameter names."""
    for module in network.modules():
        if isinstance(module, MaskedConv1d) and module.conv.groups > 1:
            module.register_module("conv", Depthwise(module.conv))
    return network


def batches(rng: np.random.Generator, voices: Sequence[Voice], size: int) -> Iterator[Batch]:
    """Draw strings of all speakers without end."""
    while True:
        drawn = rng.integers(len(voices), size=POOL * size)
        strings = [draw(rng, voices[number], TRAINING) for number in drawn]
        strings.sort(key=lambda string: len(string.samples))
        for start in rng.permutation(POOL) * size:
            group = strings[start : start + size]
            length = len(group[-1].samples) + int(rng.uniform(*TRAINING.edge) * 2 * RATE)
            heard = [record(rng, string.samples, TRAINING, length) for string in group]
            labels = [[ENGLISH.index(letter) for letter in string.text] for string in group]
            yield Batch(
                features=torch.from_numpy(np.stack([log_mel(each, FRONTEND) for each in heard])),
                targets=torch.tensor([label for each in labels for label in each]),
                lengths=torch.tensor([len(each) for each in labels]),
            )


def mask(rng: np.random.Generator, features: Tensor) -> None:
    """Set random bands of mels and spans of frames to their mean, 0, in each string, in place."""
    for string in features:
        for values, widest in ((string, MASKED_MELS), (string.T, MASKED_FRAMES)):
            for width in rng.integers(widest + 1, size=MASKS):
                start = rng.integers(len(values) - width + 1)
                values[start : start + width] = 0


def train(voices: Sequence[Voice], plan: Plan) -> QuartzNet:
    """Train a network from scratch and return it in evaluation mode.

    Raises:
        IntqError: It takes longer than `plan.minutes`.
    """
    rng, start = np.random.default_rng(plan.seed), time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        network = quicken(QuartzNet(digits_config())).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=plan.rate, weight_decay=plan.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=plan.rate, total_steps=plan.steps, pct_start=0.15
    )
    losses: list[float] = []
    source = batches(rng, voices, plan.batch)
    for step in range(1, plan.steps + 1):
        batch = next(source)
        mask(rng, batch.features)
        losses.append(_step(network, optimizer, batch, plan.clip))
        schedule.step()
        minutes = (time.monotonic() - start) / 60
        if step % REPORTED == 0:
            mean = np.mean(losses[-REPORTED:])
            print(
                f"step {step} of {plan.steps}: loss {mean:.4f}, {minutes:.1f} min", file=sys.stderr
            )
        if minutes > plan.minutes:
            raise IntqError(
                f"stopped at step {step} of {plan.steps} after {minutes:.1f} minutes; nothing was "
                "written; raise --minutes or lower --steps"
            )
    settle(network, itertools.islice(source, plan.settling))
    return network.eval()


def _step(network: QuartzNet, optimizer: torch.optim.Optimizer, batch: Batch, clip: float) -> float:
    log_probs = network(batch.features).transpose(0, 1)
    frames = torch.full((len(batch.lengths),), len(log_probs))
    loss = nn.functional.ctc_loss(
        log_probs, batch.targets, frames, batch.lengths, blank=len(ENGLISH)
    )
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
    return loss.item()


def settle(network: nn.Module, source: Iterable[Batch]) -> None:
    """Set BatchNorm's statistics to their mean over batches at the final weights.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3.
    """
    network.eval()  # without dropout
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    with torch.no_grad():
        for batch in source:
            network(batch.features)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum


def score(network: QuartzNet, voices: Sequence[Voice], *, seed: int) -> Evaluation:
    """Word errors on held-out strings."""
    hypotheses = []
    for number in range(HELD_OUT_STRINGS):
        string = held_out_string(voices, number, seed=seed)
        features = torch.from_numpy(log_mel(string.samples, FRONTEND))
        with torch.no_grad():
            (log_probs,) = network(features.unsqueeze(0))
        hypotheses.append(
            Hypothesis(
                audio=str(number),
                split=string.speaker,
                reference=string.text,
                text=" ".join(greedy(log_probs.numpy(), ENGLISH).split()),
            )
        )
    return evaluation(hypotheses)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except IntqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    plan = Plan()
    add = commands.add_parser("train", help="train and write a .nemo file").add_argument
    add("-o", dest="output", type=Path, required=True, help="the .nemo file to write")
    add("--steps", type=_whole, default=plan.steps, help="batches to train on (%(default)s)")
    add("--batch", type=_whole, default=plan.batch, help="strings per batch (%(default)s)")
    add("--minutes", type=float, default=plan.minutes, help="give up after these (%(default)s)")
    add("--threads", type=_whole, default=1, help="results depend on it (%(default)s)")
    commands.choices["train"].set_defaults(run=_run_train)
    add = commands.add_parser("test-set", help="write held-out strings").add_argument
    add("-o", dest="output", type=Path, required=True, help="the folder to write")
    add("--count", type=_whole, default=HELD_OUT_STRINGS, help="strings (%(default)s)")
    commands.choices["test-set"].set_defaults(run=_run_test_set)
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, default=plan.seed, help="%(default)s")
        command.add_argument("--assets", type=Path, default=ASSETS, help="holds fsdd/")
    return parser


def _whole(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; expected at least 1")
    return number


def _run_train(options: argparse.Namespace) -> None:
    check_output(options.output)
    speech_package("jiwer")  # rather now than after the training
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    plan = Plan(
        steps=options.steps, batch=options.batch, seed=options.seed, minutes=options.minutes
    )
    # The front end's matrix products are so small that NumPy's threads only get in torch's way.
    with threadpool_limits(1, user_api="blas"):
        network = train(read_voices(options.assets / "fsdd", held_out=False), plan)
    write_nemo(options.output, network, FRONTEND)
    found = score(network, read_voices(options.assets / "fsdd", held_out=True), seed=plan.seed)
    print(json.dumps(found.to_dict()))


def _run_test_set(options: argparse.Namespace) -> None:
    voices = read_voices(options.assets / "fsdd", held_out=True)
    strings = (held_out_string(voices, n, seed=options.seed) for n in range(options.count))
    write_strings(options.output, strings)


if __name__ == "__main__":
    sys.exit(main())
