"""Prints the README's tables: ours and onnxruntime's quantizer, on the same data, in one run.

    python tools/bench.py [TABLE ...] [--assets FOLDER] [--work FOLDER]

Tables: accuracy, boosters, conformer, keywords, whisper, few_bits, rnnt, digits, speed,
calibration, cost, kernels and integer; without names, all of them.
Needs the extras cpu and speech, and the assets (INTQ_ASSETS, default ../shared/assets): the real
QuartzNet15x5, speech_dev and speech_train; `kernels` needs none of these.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import bench_boosters
import bench_calibration
import bench_conformer
import bench_cost
import bench_few_bits
import bench_integer
import bench_kernels
import bench_keywords
import bench_rnnt
import bench_sub8bit
import bench_whisper
import click
from bench_calibration import PEER_BATCHES, SWEEP_BATCHES

from onnx_intq import feeds, graph, runtime, shapes
from onnx_intq.console import bar, table
from onnx_intq.cost import cost
from onnx_intq.evaluate import Hypothesis, Score, evaluation
from onnx_intq.feeds import Batch
from onnx_intq.manifest import Utterance, read_manifest
from onnx_intq.recognizer import Recognizer
from onnx_intq.samples import specs
from onnx_intq.speech import features_of
from onnx_intq.verify import random_feeds

CALIBRATION_UTTERANCES = 24


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where things are.

    Attributes:
        assets: Real model and speech.
        work: Made files are kept here, and made again only if missing.
    """

    assets: Path
    work: Path

    @property
    def float_model(self) -> Path:
        """The real QuartzNet15x5 as float ONNX."""
        return self.made("float", lambda path: _cli("export", self._nemo, "-o", path))

    @property
    def _nemo(self) -> Path:
        return self.assets / "quartznet15x5.nemo"

    def made(self, name: str, make: Callable[[Path], object], suffix: str = ".onnx") -> Path:
        """The file `name`, made by `make(path)` unless it is there."""
        path = self.work / f"{name}{suffix}"
        if not path.exists():
            click.echo(f"making {name} ...", err=True)
            make(path)
        return path

    def exported(self, name: str) -> Path:
        """A model of the zoo, as float ONNX."""
        return self.made(name, lambda path: _cli("export", name, "-o", path))

    def ours(self, name: str, *options: object) -> Path:
        """A quantized model of ours."""
        source = self.float_model
        return self.made(name, lambda path: _cli("quantize", source, "-o", path, *options))

    @property
    def real_feeds(self) -> Path:
        """Features of the first utterances of speech_train."""

        def make(path: Path) -> None:
            recognizer = Recognizer(self.float_model)
            utterances = read_manifest(self.assets / "speech_train" / "manifest.json")
            chosen = utterances[:CALIBRATION_UTTERANCES]
            inputs = specs(graph.load(self.float_model))
            batches = (
                feeds.speech_batch([features_of(u, recognizer.frontend)], inputs) for u in chosen
            )
            feeds.write(path, batches)

        return self.made("real", make, ".npz")

    def synthetic_feeds(self, method: str) -> Path:
        """What `quantize` makes by itself; made once for several models."""
        command = ("synthesize", self.float_model, "--method", method, "-o")
        return self.made(method, lambda path: _cli(*command, path), ".npz")

    def integer(self, cpu: str) -> Path:
        """Our integer-only model, from the float model and the same data."""
        options = ("--data", self.synthetic_feeds("kl"), "--target", "integer", "--cpu", cpu)
        return self.ours(f"zs-integer-{cpu}", *options)

    def peer(self, name: str, data: Path, signed: bool) -> Path:
        """A model by onnxruntime's quantizer: min-max, QDQ, per channel, the same data."""
        source = self.float_model
        return self.made(name, lambda path: _quantize_static(source, path, data, signed))


def accuracy(bench: Bench) -> None:
    """Word errors on speech_dev."""
    real, random = bench.real_feeds, bench.synthetic_feeds("random")
    zero = ("--data", bench.synthetic_feeds("kl"))
    models = {
        "float": bench.float_model,
        "W8A8 zero-shot, ort": bench.ours("zs-ort"),
        "W8A8 zero-shot, tensorrt": bench.ours("zs-trt", *zero, "--target", "tensorrt"),
        "W6A8 zero-shot, ort": bench.ours("zs-ort-w6", *zero, "-w", 6),
        "W4A8 zero-shot, ort": bench.ours("zs-ort-w4", *zero, "-w", 4),
        "W8A8 zero-shot, integer": bench.integer("any"),
        "W8A8 24 real utterances, ort": bench.ours("real-ort", "--data", real),
        "W8A8 24 real utterances, tensorrt": bench.ours(
            "real-trt", "--data", real, "--target", "tensorrt"
        ),
        "W8A8 random data, ort": bench.ours("random-ort", "--data", random),
        "onnxruntime, 24 real utterances, u8": bench.peer("peer-real-u8", real, signed=False),
        "onnxruntime, 24 real utterances, s8": bench.peer("peer-real-s8", real, signed=True),
        "onnxruntime, random data, u8": bench.peer("peer-random-u8", random, signed=False),
    }
    rows = []
    for name, score in zip(models, _scores(bench, list(models.values())), strict=True):
        size = models[name].stat().st_size / 1e6
        rows.append((name, score.errors, f"{score.wer:.2f}", f"{score.differs:.2f}", f"{size:.2f}"))
    table("speech_dev, 1,173 words, greedy", ("model", "errors", "WER %", "differs %", "MB"), rows)


def boosters(bench: Bench) -> None:
    """Word errors with and without each booster, for weights of 8, 6 and 4 bits."""
    data = ("--data", bench.synthetic_feeds("kl"))
    bench_boosters.print_table(
        lambda name, *options: bench.ours(name, *data, *options),
        lambda models: _scores(bench, [bench.float_model, *models])[1:],
    )


def conformer(bench: Bench) -> None:
    """The trained Conformer on held-out strings."""
    bench_conformer.print_table(bench.assets, bench.work, _quantize_static)


def keywords(bench: Bench) -> None:
    """MatchboxNet, a foreign model."""
    bench_keywords.print_table(bench.assets, bench.made, lambda *a: _cli("quantize", *a))


def whisper(bench: Bench) -> None:
    """The encoder of Whisper base, a transformer without BatchNorm."""
    bench_whisper.print_table(bench.assets, bench.work, _cli)


def few_bits(bench: Bench) -> None:
    """Weights of 5 and 4 bits, without training and with it."""
    source = bench.float_model
    bench_few_bits.print_table(
        lambda name, *command: bench.made(
            name, lambda path: _cli(command[0], source, "-o", path, *command[1:])
        ),
        lambda models: _scores(bench, [source, *models])[1:],
        bench.synthetic_feeds("kl"),
        bench.assets / "speech_train" / "manifest.json",
    )


def rnnt(bench: Bench) -> None:
    """The small RNN-T on held-out strings, and its memory."""
    bench_rnnt.print_tables(
        bench.assets,
        bench.work,
        lambda name, command, model, *options: bench.made(
            name, lambda path: _cli(command, model, "-o", path, *options), suffix=""
        ),
    )


def digits(bench: Bench) -> None:
    """Trainings of the RNN-T and the Conformer to 8..2 bits, by every method."""
    bench_sub8bit.main(["--assets", str(bench.assets)])


def speed(bench: Bench) -> None:
    """Latency on onnxruntime, one thread."""
    models = {
        "float": bench.float_model,
        "ours, ort": bench.ours("zs-ort"),
        "ours, integer": bench.integer("any"),
        "ours, integer, --cpu vnni": bench.integer("vnni"),
        "onnxruntime's quantizer, u8": bench.peer("peer-real-u8", bench.real_feeds, signed=False),
    }
    net = graph.load(bench.float_model)
    batch = random_feeds(net, shapes.input_shapes(net, seconds=10))
    timings = runtime.latency(list(models.values()), [batch] * len(models), rounds=15)
    rows = [
        (name, f"{t.median * 1e3:.0f}", f"{1 / t.ratio:.2f}")
        for name, t in zip(models, timings, strict=True)
    ]
    table("10 s of audio, one thread, in turn", ("model", "median ms", "times float"), rows)


def calibration(bench: Bench) -> None:
    """Time and memory of quantizing, of one calibration sweep, and of the passes alone."""
    random = bench_calibration.write_random
    many = bench.made("sweep", lambda path: random(path, SWEEP_BATCHES), ".npz")
    few = bench.made("sweep-peer", lambda path: random(path, PEER_BATCHES), ".npz")
    source, work = bench.float_model, bench.work
    peer = [sys.executable, __file__, "peer-percentile", source, few, work / "timed.onnx"]
    bench_calibration.print_tables(source, many, few, work, peer)


def costs(bench: Bench) -> None:
    """Parameters, sizes and bit operations, for 10 s of audio."""
    models = {
        "float": bench.float_model,
        "W8A8": bench.ours("zs-ort"),
        "W6A8": bench.ours("zs-ort-w6", "--data", bench.synthetic_feeds("kl"), "-w", 6),
    }
    found = {name: cost(graph.load(path)) for name, path in models.items()}
    first = found["float"]
    rows = [
        (
            name,
            f"{c.parameters / 1e6:.2f}",
            f"{models[name].stat().st_size / 1e6:.2f}",
            f"{c.macs / 1e9:.3f}",
            f"{c.bops / 1e12:.3f}",
            f"{first.bops / c.bops:.1f}",
        )
        for name, c in found.items()
    ]
    header = ("model", "M parameters", "file MB", "GMACs", "TBOPs", "times fewer BOPs")
    table("QuartzNet15x5, 10 s of audio", header, rows)
    papers = {
        "QuartzNet15x5": bench.float_model,
        "Jasper": bench.exported("jasper10x5dr"),
        "Conformer-Large": bench.exported("conformer-ctc-large"),
    }
    click.echo(bench_cost.markdown(bench_cost.rows(papers)))


def kernels(_: Bench) -> None:
    """Errors of the integer kernels."""
    bench_kernels.print_table()


def integer(bench: Bench) -> None:
    """The integer-only model against the Q/DQ file, the interpreter, and its profile."""
    manifest = bench.assets / "speech_dev" / "manifest.json"
    bench_integer.print_tables(bench.ours("zs-ort"), bench.integer("any"), manifest)


TABLES = {
    "calibration": calibration,
    "accuracy": accuracy,
    "boosters": boosters,
    "conformer": conformer,
    "keywords": keywords,
    "whisper": whisper,
    "few_bits": few_bits,
    "rnnt": rnnt,
    "digits": digits,
    "speed": speed,
    "cost": costs,
    "kernels": kernels,
    "integer": integer,
}
"""In this order: a child's peak memory counts its parent's at the start."""


def _scores(bench: Bench, models: Sequence[Path]) -> list[Score]:
    """Scores of the models against the first, which is float; features are made once."""
    first = Recognizer(models[0])
    utterances = read_manifest(bench.assets / "speech_dev" / "manifest.json")
    features = [features_of(u, first.frontend) for u in utterances]
    scores: list[Score] = []
    against: list[str] = []
    with bar("evaluate") as tick:
        for done, model in enumerate(models):
            recognizer = Recognizer(model, frontend=first.frontend, labels=first.labels)
            texts = [" ".join(recognizer.transcribe([f])[0].split()) for f in features]
            against = against or texts
            scores.append(_score(utterances, texts, against))
            tick(done + 1, len(models))
    return scores


def _score(utterances: Sequence[Utterance], texts: list[str], against: list[str]) -> Score:
    hypotheses = [
        Hypothesis(
            audio=u.audio.name,
            split=u.split,
            reference=" ".join((u.text or "").lower().split()),
            text=text,
            against=float_text,
        )
        for u, text, float_text in zip(utterances, texts, against, strict=True)
    ]
    return evaluation(hypotheses).total


def _cli(*arguments: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "onnx_intq.cli", *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def _quantize_static(
    source: Path, path: Path, data: Path, signed: bool, method: str = "MinMax"
) -> None:
    from onnxruntime import quantization as peer

    class Reader(peer.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches: Iterator[Batch] = iter(feeds.read(data))

        def get_next(self) -> Batch | None:
            return next(self._batches, None)

    folded = path.with_suffix(".folded.onnx")
    peer.quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
    activations = peer.QuantType.QInt8 if signed else peer.QuantType.QUInt8
    peer.quantize_static(
        str(folded),
        str(path),
        Reader(),
        quant_format=peer.QuantFormat.QDQ,
        per_channel=True,
        activation_type=activations,
        weight_type=peer.QuantType.QInt8,
        calibrate_method=peer.CalibrationMethod[method],
        extra_options={"ActivationSymmetric": signed},
    )
    folded.unlink()


@click.command()
@click.argument("tables", nargs=-1)
@click.option(
    "--assets",
    type=click.Path(path_type=Path),
    envvar="INTQ_ASSETS",
    default=Path(__file__).parents[2] / "shared" / "assets",
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench"))
def main(tables: tuple[str, ...], assets: Path, work: Path) -> None:
    """Print the tables."""
    if tables and tables[0] == "peer-percentile":
        _quantize_static(
            Path(tables[1]), Path(tables[3]), Path(tables[2]), signed=False, method="Percentile"
        )
        return
    if unknown := set(tables) - set(TABLES):
        raise click.ClickException(f"no table {unknown.pop()!r}; expected: {', '.join(TABLES)}")
    if set(tables) != {"kernels"} and not assets.is_dir():
        raise click.ClickException(f"no assets at {assets}; set INTQ_ASSETS")
    work.mkdir(parents=True, exist_ok=True)
    click.echo(f"onnxruntime {version('onnxruntime')}, {os.cpu_count()} processors")
    for name in tables or TABLES:
        TABLES[name](Bench(assets=assets, work=work))


if __name__ == "__main__":
    main()
