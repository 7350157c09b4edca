"""Trains the models that are shipped in `models/pretrained`, and makes their test set.

A small QuartzNet and a small Conformer, by CTC, and a small RNN-T, which hear strings of spoken
English digits and write them in letters or parts of words. The data is the Free Spoken Digit
Dataset, `fsdd/` in the folder of assets. On a CPU:

    python tools/train_digits.py train -o models/pretrained/digits.nemo
    python tools/train_digits.py train --model conformer -o models/pretrained/digits-conformer.nemo
    python tools/train_digits.py train --model rnnt -o models/pretrained/digits-rnnt.nemo
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from digit_models import FRONTEND, RECIPES, Plan, digits_config, encode
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
from digit_transducer import fixed_frontend, loss, transcriber
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn

from onnx_intq.depthwise import depthwise_conv1d
from onnx_intq.evaluate import Evaluation, Hypothesis, evaluation
from onnx_intq.frontend import Floats, Frontend, log_mel, speech_package
from onnx_intq.graph import check_output
from onnx_intq.models.jasper_block import MaskedConv1d
from onnx_intq.models.nemo import Network, build, write_nemo
from onnx_intq.models.nemo_config import NetworkConfig
from onnx_intq.models.quartznet import ENGLISH
from onnx_intq.models.rnnt import Rnnt, RnntConfig
from onnx_intq.speech import greedy
from onnx_intq.transform import IntqError

ASSETS = Path(
    os.environ.get("INTQ_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets")
)
HELD_OUT_STRINGS = 200
POOL = 8
"""Batches that are drawn together and sorted by length, so that little of a batch is silence."""
MASKS, MASKED_MELS, MASKED_FRAMES = 2, 10, 10
"""SpecAugment (Park et al., Interspeech 2019): masks per axis, and their greatest widths."""
REPORTED = 100
"""Steps between two lines of progress."""


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


def quicken(network: Network) -> Network:
    """Replace the depthwise convolutions, in place and under the same parameter names."""
    for module in network.modules():
        if isinstance(module, MaskedConv1d) and module.conv.groups > 1:
            module.register_module("conv", Depthwise(module.conv))
    return network


def batches(
    rng: np.random.Generator,
    voices: Sequence[Voice],
    size: int,
    labels: Sequence[str] = ENGLISH,
    frontend: Frontend = FRONTEND,
) -> Iterator[Batch]:
    """Draw strings of all speakers without end, `size` at a time, written in `labels`."""
    while True:
        drawn = rng.integers(len(voices), size=POOL * size)
        strings = [draw(rng, voices[number], TRAINING) for number in drawn]
        strings.sort(key=lambda string: len(string.samples))
        for start in rng.permutation(POOL) * size:
            group = strings[start : start + size]
            length = len(group[-1].samples) + int(rng.uniform(*TRAINING.edge) * 2 * RATE)
            heard = [record(rng, string.samples, TRAINING, length) for string in group]
            targets = [encode(string.text, labels) for string in group]
            yield Batch(
                features=torch.from_numpy(np.stack([log_mel(each, frontend) for each in heard])),
                targets=torch.tensor([label for each in targets for label in each]),
                lengths=torch.tensor([len(each) for each in targets]),
            )


def mask(rng: np.random.Generator, features: Tensor) -> None:
    """Set random bands of mels and spans of frames to their mean, 0, in each string, in place."""
    for string in features:
        for values, widest in ((string, MASKED_MELS), (string.T, MASKED_FRAMES)):
            for width in rng.integers(widest + 1, size=MASKS):
                start = rng.integers(len(values) - width + 1)
                values[start : start + width] = 0


def train(
    voices: Sequence[Voice],
    plan: Plan,
    config: NetworkConfig | None = None,
    frontend: Frontend = FRONTEND,
) -> Network:
    """Train a network, by default that of `digits_config`; return it in evaluation mode.

    Raises:
        IntqError: It takes longer than `plan.minutes`.
    """
    rng, start = np.random.default_rng(plan.seed), time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        network = quicken(build(config or digits_config())).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=plan.rate, weight_decay=plan.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=plan.rate, total_steps=plan.steps, pct_start=0.15
    )
    losses: list[float] = []
    source = batches(rng, voices, plan.batch, network.config.labels, frontend)
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


def _step(network: Network, optimizer: torch.optim.Optimizer, batch: Batch, clip: float) -> float:
    if isinstance(network, Rnnt):
        found = loss(network, batch.features, batch.targets, batch.lengths)
    else:
        found = _ctc_loss(network, batch)
    optimizer.zero_grad()
    found.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
    return found.item()


def _ctc_loss(network: Network, batch: Batch) -> Tensor:
    log_probs = network(batch.features).transpose(0, 1)
    frames = torch.full((len(batch.lengths),), len(log_probs))
    return nn.functional.ctc_loss(
        log_probs, batch.targets, frames, batch.lengths, blank=len(network.config.labels)
    )


def settle(network: nn.Module, source: Iterable[Batch]) -> None:
    """Set BatchNorm's statistics to their mean over batches at the final weights.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3.
    """
    network.eval()  # without dropout
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]
    if not norms:
        return
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


def score(
    network: Network, voices: Sequence[Voice], *, seed: int, frontend: Frontend = FRONTEND
) -> Evaluation:
    """Word errors on held-out strings."""
    hypotheses = []
    transcribe = _transcriber(network, frontend)
    for number in range(HELD_OUT_STRINGS):
        string = held_out_string(voices, number, seed=seed)
        text = transcribe(log_mel(string.samples, frontend))
        hypotheses.append(
            Hypothesis(
                audio=str(number),
                split=string.speaker,
                reference=string.text,
                text=" ".join(text.split()),
            )
        )
    return evaluation(hypotheses)


def _transcriber(network: Network, frontend: Frontend) -> Callable[[Floats], str]:
    if isinstance(network, Rnnt):
        return transcriber(network, frontend)

    def transcribe(features: Floats) -> str:
        with torch.no_grad():
            (log_probs,) = network(torch.from_numpy(features).unsqueeze(0))
        return greedy(log_probs.numpy(), network.config.labels)

    return transcribe


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
    add = commands.add_parser("train", help="train and write a .nemo file").add_argument
    add("-o", dest="output", type=Path, required=True, help="the .nemo file to write")
    add("--model", choices=RECIPES, default="quartznet", help="%(default)s")
    add("--steps", type=_whole, help="batches to train on (the model's)")
    add("--batch", type=_whole, help="strings per batch (the model's)")
    add("--minutes", type=float, help="give up after these (the model's)")
    add("--threads", type=_whole, default=1, help="results depend on it (%(default)s)")
    commands.choices["train"].set_defaults(run=_run_train)
    add = commands.add_parser("test-set", help="write held-out strings").add_argument
    add("-o", dest="output", type=Path, required=True, help="the folder to write")
    add("--count", type=_whole, default=HELD_OUT_STRINGS, help="strings (%(default)s)")
    commands.choices["test-set"].set_defaults(run=_run_test_set)
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, default=0, help="%(default)s")
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
    recipe = RECIPES[options.model]
    given = {name: getattr(options, name) for name in ("steps", "batch", "seed", "minutes")}
    plan = replace(recipe.plan, **{name: n for name, n in given.items() if n is not None})
    # The front end's matrix products are so small that NumPy's threads only get in torch's way.
    with threadpool_limits(1, user_api="blas"):
        voices, frontend = read_voices(options.assets / "fsdd", held_out=False), FRONTEND
        if isinstance(recipe.config, RnntConfig):
            frontend = fixed_frontend(frontend, voices, plan.seed)
        network = train(voices, plan, recipe.config, frontend)
    write_nemo(options.output, network, frontend)
    held_out = read_voices(options.assets / "fsdd", held_out=True)
    found = score(network, held_out, seed=plan.seed, frontend=frontend)
    print(json.dumps(found.to_dict()))


def _run_test_set(options: argparse.Namespace) -> None:
    voices = read_voices(options.assets / "fsdd", held_out=True)
    strings = (held_out_string(voices, n, seed=options.seed) for n in range(options.count))
    write_strings(options.output, strings)


if __name__ == "__main__":
    sys.exit(main())
