"""Word error rate of a model on a manifest, and how far it departs from its float model.

Law: the result depends on the utterances alone, not on how they were cut into batches or shared
among processes: `Evaluation` is a function of the hypotheses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from onnx_intq.frontend import Frontend, speech_package
from onnx_intq.manifest import Utterance, read_manifest
from onnx_intq.recognizer import Recognizer, recorded_labels
from onnx_intq.runtime import Model
from onnx_intq.speech import LABELS_KEY, features_of
from onnx_intq.transducer_folder import is_folder
from onnx_intq.transducer_recognizer import TransducerRecognizer
from onnx_intq.transform import IntqError


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """What was said and what was understood: lower case, words separated by single spaces.

    Attributes:
        audio: The audio file's name, without its folder.
        split: The part of the data it belongs to, "" if unnamed.
        reference: The transcript.
        text: What the model understood.
        against: What the float model understood, None without one.
    """

    audio: str
    split: str
    reference: str
    text: str
    against: str | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """Word errors: substitutions, deletions and insertions of the best alignment.

    Attributes:
        wer: Word error rate, percent of the reference's words.
        errors: Word errors.
        words: Words in the references.
        utterances: How many were counted, those with an empty reference included.
        differs: Word error rate, percent, with the float model's hypotheses as reference; None
            without a float model.
        against_wer: Word error rate of the float model, percent.
    """

    wer: float
    errors: int
    words: int
    utterances: int
    differs: float | None = None
    against_wer: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The score of all utterances, of each split by name, and the hypotheses, in order."""

    total: Score
    splits: dict[str, Score]
    hypotheses: tuple[Hypothesis, ...]

    def to_dict(self) -> dict[str, object]:
        """For JSON: the total's figures, then `splits` with theirs; no hypotheses."""
        return asdict(self.total) | {"splits": {k: asdict(v) for k, v in self.splits.items()}}


def evaluate(
    model: Model,
    manifest: str | Path,
    *,
    against: Model | None = None,
    frontend: Frontend | None = None,
    labels: Sequence[str] | None = None,
    threads: int | None = None,
    batch_size: int = 1,
    beam: int | None = None,
    chunk: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Evaluation:
    """Transcribe a manifest with `model`, and with the float model `against`, and count errors.

    Args:
        model: A float, QDQ or integer-only CTC model, an engine file, or an RNN-T's folder.
        manifest: Utterances with transcripts.
        against: A float model with the same front end and labels.
        frontend: In place of what `model` records.
        labels: The same, without the blank.
        threads: Threads per operator, None for all processors.
        batch_size: Utterances per run for models with a length input; others get one.
        beam: Width of the beam, of RNN-Ts; None for greedy search.
        chunk: Frames of features that an RNN-T's encoder gets at once; None for all.
        progress: Called after each batch with utterances done and utterances in all.

    Raises:
        IntqError: The manifest or its audio cannot be read or holds no transcripts, the model is
            no such model, `beam` or `chunk` is given for others than RNN-Ts or out of range, or
            jiwer is missing.
    """
    speech_package("jiwer")  # rather now than after an hour
    utterances = read_manifest(manifest)
    for utterance in utterances:
        _reference(utterance)
    search = partial(open_recognizer, threads=threads, beam=beam, chunk=chunk)
    first = search(model, frontend=frontend, labels=labels)
    recognizers = [first]
    if against is not None:
        recognizers.append(search(against, frontend=first.frontend, labels=first.labels))
        if labels is None:
            _require_same_labels(first, recognizers[1])
    return evaluation(transcribe(recognizers, utterances, batch_size=batch_size, progress=progress))


def _require_same_labels(
    first: Recognizer | TransducerRecognizer, other: Recognizer | TransducerRecognizer
) -> None:
    if LABELS_KEY in other.metadata and recorded_labels(other.metadata) != first.labels:
        raise IntqError(
            "the models have different labels; expected the float model that the other was made "
            "of; change --against"
        )


def open_recognizer(
    model: Model,
    *,
    frontend: Frontend | None = None,
    labels: Sequence[str] | None = None,
    threads: int | None = None,
    beam: int | None = None,
    chunk: int | None = None,
) -> Recognizer | TransducerRecognizer:
    """Load a CTC model, or an RNN-T if `model` is a folder; arguments as for `evaluate`.

    Raises:
        IntqError: As for these recognizers, or `beam` or `chunk` is given for a CTC model.
    """
    if isinstance(model, str | Path) and is_folder(model):
        return TransducerRecognizer(
            model, frontend=frontend, labels=labels, threads=threads, beam=beam, chunk=chunk
        )
    for option, value in (("beam", beam), ("chunk", chunk)):
        if value is not None:
            raise IntqError(
                f"--{option} has no effect on CTC models; expected an RNN-T's folder; leave it out"
            )
    return Recognizer(model, frontend=frontend, labels=labels, threads=threads)


def transcribe(
    recognizers: Sequence[Recognizer | TransducerRecognizer],
    utterances: Sequence[Utterance],
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> list[Hypothesis]:
    """The hypotheses of one recognizer, or of one and its float model; features are made once.

    Raises:
        IntqError: As for `evaluate`.
    """
    if batch_size < 1:
        raise IntqError(f"batch size {batch_size}; expected at least 1; raise it")
    hypotheses: list[Hypothesis] = []
    for start in range(0, len(utterances), batch_size):
        batch = utterances[start : start + batch_size]
        features = [features_of(utterance, recognizers[0].frontend) for utterance in batch]
        texts = [recognizer.transcribe(features) for recognizer in recognizers]
        hypotheses.extend(map(_hypothesis, batch, zip(*texts, strict=True)))
        if progress:
            progress(len(hypotheses), len(utterances))
    return hypotheses


def evaluation(hypotheses: Sequence[Hypothesis]) -> Evaluation:
    """Score hypotheses, in whatever shares they were made.

    Raises:
        IntqError: The references hold no words, or jiwer is missing.
    """
    total = _score(hypotheses)
    if not total.words:
        raise IntqError("references hold no words; expected transcripts under the key text")
    names = sorted({hypothesis.split for hypothesis in hypotheses} - {""})
    splits = {name: _score([h for h in hypotheses if h.split == name]) for name in names}
    return Evaluation(total=total, splits=splits, hypotheses=tuple(hypotheses))


def _score(hypotheses: Sequence[Hypothesis]) -> Score:
    references, texts = [h.reference for h in hypotheses], [h.text for h in hypotheses]
    errors, words = _word_errors(references, texts)
    score = Score(wer=_percent(errors, words), errors=errors, words=words, utterances=len(texts))
    against = [h.against for h in hypotheses if h.against is not None]
    if len(against) < len(texts):
        return score
    return replace(
        score,
        differs=_percent(*_word_errors(against, texts)),
        against_wer=_percent(*_word_errors(references, against)),
    )


def _word_errors(references: list[str], texts: list[str]) -> tuple[int, int]:
    found = speech_package("jiwer").process_words(references, texts)
    lost = found.substitutions + found.deletions
    return lost + found.insertions, lost + found.hits


def _percent(errors: int, words: int) -> float:
    # Without words every insertion counts as one word: a finite figure, 0 where nothing was said.
    return 100 * errors / max(1, words)


def _hypothesis(utterance: Utterance, texts: tuple[str, ...]) -> Hypothesis:
    return Hypothesis(
        audio=utterance.audio.name,
        split=utterance.split,
        reference=_reference(utterance),
        text=_plain(texts[0]),
        against=_plain(texts[1]) if len(texts) > 1 else None,
    )


def _reference(utterance: Utterance) -> str:
    if utterance.text is None:
        raise IntqError(
            f"{utterance.audio}: has no transcript; expected the key text in the manifest"
        )
    return _plain(utterance.text)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
