"""Quantization-aware training of an ONNX model: files in, files out.

The model's source is not needed: its graph is run by torch, with a quantizer in each weight's
place. Trained are the weights, the biases and the quantizers' own parameters; what is written has
the float operators, behind `DequantizeLinear` of int8 weights with few distinct values.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_graphsurgeon as gs
import torch

import onnx_intq
from onnx_intq import checkpoint
from onnx_intq.bit_allocation import (
    Costs,
    allocate,
    costs_of,
    free_at_one_bit,
    widths,
)
from onnx_intq.codebook import insert_coded
from onnx_intq.distributed import Group, group
from onnx_intq.graph import check_output, metadata, save, sha256
from onnx_intq.quantize import prepared
from onnx_intq.quantized_weights import HardWeights, QuantizedWeights, untrained
from onnx_intq.source import Bar
from onnx_intq.training_data import Samples, collate, shared
from onnx_intq.training_loop import Progress, Trainer, held_out_loss
from onnx_intq.training_loss import (
    MODEL,
    GraphObjective,
    Objective,
    heads,
    inner_tensors,
    lengths_output,
    require_ctc,
)
from onnx_intq.training_network import TrainedNetwork, weight_places
from onnx_intq.training_plan import Plan
from onnx_intq.training_source import TrainingSource
from onnx_intq.transducer_folder import (
    check_folder_output,
    is_folder,
    part_paths,
    write_folder,
)
from onnx_intq.transducer_objective import TransducerObjective, require_transducer
from onnx_intq.transform import IntqError

MEASURED = 4
"""Batches on which widths are chosen."""
RECORD = "onnx_intq.training"
"""Metadata key of the settings, JSON."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a training is run; what its result depends on is in the plan.

    Attributes:
        device: Of torch.
        minutes: Wall time after which no step is begun.
        checkpoint: File to write at every validation.
        resume: Checkpoint to go on from.
    """

    device: str = "cpu"
    minutes: float = math.inf
    checkpoint: Path | None = None
    resume: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training did.

    Attributes:
        progress: Steps, losses, and why it ended.
        float_loss: Of the float model, on the held-out data.
        bits: Of each weight, by key.
        share: Of 8 bits per weight that these are.
        costs: What 1 to 8 bits of each weight alone cost, where widths were chosen.
        samples: Utterances or rows trained on, and held out.
        left_out: Utterances that were too long.
        seconds: Wall time.
    """

    progress: Progress
    float_loss: float
    bits: dict[str, int]
    share: float
    costs: Costs
    samples: tuple[int, int]
    left_out: int
    seconds: float

    @property
    def one_bit(self) -> list[str]:
        """The weights that one bit alone costs next to nothing, where widths were chosen."""
        return free_at_one_bit(self.costs)


def train(
    model: Path, output: Path, source: TrainingSource, plan: Plan, run: Run, *, bar: Bar
) -> Training | None:
    """Train the float model in the file or RNN-T folder `model`; write `output` of the same kind.

    Under `torchrun` every process trains on its share of each batch, and the first one writes.

    Args:
        model: A float ONNX file, or the folder of an RNN-T.
        output: Where to write; another file or folder.
        source: What to train on.
        plan: How to train.
        run: Device, time and checkpoints.
        bar: Makes a progress bar.

    Returns:
        What was done; None in processes other than the first.

    Raises:
        IntqError: Bad input; nothing is written.
    """
    start = time.monotonic()
    _check_paths(model, output, source, run)
    with _deterministic(run.device), group() as ranks:
        setup = _set_up(model, source, plan, run, bar)
        about = {**plan.about(), "model": setup.shas, "data": source.fingerprint()}
        float_loss = held_out_loss(setup.objective, setup.held, {}, ranks, run.device)
        if plan.method == "none":
            progress = _untrained(setup, ranks, run.device)
        else:
            progress = _trained(setup, plan, run, ranks, about, bar)
        if ranks.rank:
            return None
        _write(output, setup, progress.best, about)
    return Training(
        progress=progress,
        float_loss=float_loss,
        bits=setup.bits,
        share=_share(setup),
        costs=setup.costs,
        samples=(len(setup.train.samples), len(setup.held.samples)),
        left_out=setup.left_out,
        seconds=time.monotonic() - start,
    )


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """Everything that is there before the first step."""

    network: TrainedNetwork
    objective: Objective
    train: Samples
    held: Samples
    left_out: int
    bits: dict[str, int]
    costs: Costs
    shas: dict[str, str]


def _set_up(model: Path, source: TrainingSource, plan: Plan, run: Run, bar: Bar) -> _Setup:
    paths = part_paths(model) if is_folder(model) else {MODEL: model}
    parts = {name: prepared(path, all_float=True) for name, path in paths.items()}
    places = {place.key: place for place in weight_places(parts)}
    if not places:
        raise IntqError(
            f"{model}: holds no weights to quantize; expected Conv, MatMul, Gemm or LSTM nodes "
            "with constant float32 weights; check the model"
        )
    bits = widths(places, plan.bits, plan.overrides)
    _require_trainable(parts, source, plan)
    first = next(iter(parts.values()))
    with bar("read") as tick:
        samples, left_out = source.samples(first, plan, tick)
    kept, held = shared(samples, plan.held_out, plan.seed)
    size, longest = plan.batch_size, source.longest(first, plan)
    train = Samples(kept, size, plan.seed, longest)
    network, objective = _network(parts, source, plan, run.device)
    costs: Costs = {}
    if plan.budget is not None:
        bits, costs = _allocated(network, source, plan, train, bar)
    return _Setup(
        network=network,
        objective=objective,
        train=train,
        held=Samples(held, size, plan.seed, longest),
        left_out=left_out,
        bits=bits,
        costs=costs,
        shas={name: sha256(path) for name, path in paths.items()},
    )


def _require_trainable(parts: dict[str, gs.Graph], source: TrainingSource, plan: Plan) -> None:
    """Refuse what the losses are not made for, before data is read."""
    if MODEL not in parts:
        if source.data is not None:
            raise IntqError(
                "feeds, --data, for an RNN-T, whose predictor reads transcripts; expected speech "
                "with transcripts; give --manifest"
            )
        require_transducer(parts, len(source.known_labels(parts["encoder"])))
    elif plan.task and source.data is None:
        graph = parts[MODEL]
        require_ctc(graph, heads(graph), source.known_labels(graph))


def _network(
    parts: dict[str, gs.Graph], source: TrainingSource, plan: Plan, device: str
) -> tuple[TrainedNetwork, Objective]:
    if MODEL not in parts:
        network = TrainedNetwork(parts, {}, device)
        return network, TransducerObjective(network=network, task=plan.task, distill=plan.distill)
    graph, task = parts[MODEL], plan.task if source.data is None else 0.0
    nodes = [place.site.nodes[0] for place in weight_places(parts)]
    found, inner = heads(graph), [] if task else inner_tensors(graph, nodes)
    taps = dict.fromkeys([*inner, *(head.tensor for head in found)])
    network = TrainedNetwork(parts, {MODEL: taps}, device)
    return network, GraphObjective(
        network=network,
        heads=found,
        task=task,
        distill=plan.distill,
        inner=inner,
        lengths=lengths_output(graph),
    )


def _allocated(
    network: TrainedNetwork, source: TrainingSource, plan: Plan, train: Samples, bar: Bar
) -> tuple[dict[str, int], Costs]:
    """Widths under the budget, and what they were chosen by."""
    assert plan.budget is not None  # noqa: S101 - asked for this
    alone = replace(plan, task=0.0, distill=1.0)
    _, judge = _network(network.parts, source, alone, network.device)
    steps = range(min(MEASURED, train.per_epoch))
    drawn = [train.at(step) for step in steps]
    batches = [collate(samples, samples, network.device) for samples in drawn]
    with bar("measure widths") as tick:
        costs = costs_of(network, judge, batches, plan.seed, tick)
    sizes = {key: place.site.constant.values.size for key, place in network.weights.items()}
    named = widths(network.weights, 0, plan.overrides)
    fixed = {key: width for key, width in named.items() if width}
    return allocate(costs, sizes, plan.budget, fixed), costs


def _untrained(setup: _Setup, ranks: Group, device: str) -> Progress:
    hard = untrained(setup.network, setup.bits)
    loss = held_out_loss(setup.objective, setup.held, hard.values(device), ranks, device)
    return Progress(best=hard, best_loss=loss, history=[(0, loss)])


def _trained(
    setup: _Setup, plan: Plan, run: Run, ranks: Group, about: Mapping[str, object], bar: Bar
) -> Progress:
    weights = QuantizedWeights(setup.network, plan.method, setup.bits)
    data = (setup.train, setup.held)
    trainer = Trainer(weights, setup.objective, data, plan, ranks, run.device)
    if run.resume is not None:
        trainer.restore(checkpoint.read(run.resume, about))
    path = None if ranks.rank else run.checkpoint
    with bar("train") as tick:
        return trainer.run(
            minutes=run.minutes,
            save=None if path is None else lambda state: checkpoint.write(path, state, about),
            tick=tick,
        )


def _write(output: Path, setup: _Setup, hard: HardWeights, about: Mapping[str, object]) -> None:
    """Put the weights into the graphs, and these into files."""
    network = setup.network
    for key, coded in hard.coded.items():
        place = network.weights[key]
        insert_coded(network.parts[place.part], place.site.constant, coded)
    for part, graph in network.parts.items():
        tensors = graph.tensors()
        for key, bias in hard.biases.items():
            owner, _, name = key.partition("/")
            if owner == part:
                tensors[name].values = bias
        metadata(graph).update(
            {
                "onnx_intq.version": onnx_intq.__version__,
                "onnx_intq.source_sha256": setup.shas[part],
                "onnx_intq.data_sha256": str(about["data"]),
                "onnx_intq.seed": str(about["seed"]),
                RECORD: json.dumps(about, sort_keys=True),
            }
        )
    if MODEL in network.parts:
        save(network.parts[MODEL], output)
        return

    def write(target: Path) -> None:
        for name, graph in network.parts.items():
            save(graph, target / f"{name}.onnx")

    write_folder(output, write)


def _share(setup: _Setup) -> float:
    """Bits of all weights together, as a share of 8 each."""
    sizes = {k: p.site.constant.values.size for k, p in setup.network.weights.items()}
    total = sum(sizes[key] * bits for key, bits in setup.bits.items())
    return float(total / (8 * sum(sizes.values())))


def _check_paths(model: Path, output: Path, source: TrainingSource, run: Run) -> None:
    read = (model, source.path, run.resume)
    if is_folder(model):
        check_folder_output(output, *read)
    else:
        check_output(output, *read)
    if run.checkpoint is not None:
        whole = run.checkpoint.resolve()
        if output.resolve() in (whole, *whole.parents):
            raise IntqError(
                f"{run.checkpoint}: is or lies in the output; expected another place; change "
                "--checkpoint"
            )
        check_output(run.checkpoint, model, source.path, option="--checkpoint")
    if run.device.startswith("cuda") and not torch.cuda.is_available():
        raise IntqError(
            f"device {run.device!r}: no CUDA device found; expected one; use --device cpu"
        )


@contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """Have torch give the same numbers again; some of its CUDA kernels cannot."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(device == "cpu" or before)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
