"""The pieces of a SentencePiece model, which are the labels of a model with a BPE vocabulary.

Source: Kudo and Richardson, "SentencePiece", EMNLP 2018. Law: a CTC model's classes are the pieces
in the order of their numbers, and the blank.
"""

from __future__ import annotations

import importlib

from onnx_intq.graph import first_line
from onnx_intq.transform import IntqError


def pieces(model: bytes) -> tuple[str, ...]:
    """The pieces of a SentencePiece model, the content of its `.model` file, by number.

    Raises:
        IntqError: It is no such model, or sentencepiece is missing.
    """
    try:
        sentencepiece = importlib.import_module("sentencepiece")
    except ImportError as error:
        raise IntqError(
            f"cannot import sentencepiece ({first_line(error)}); this model's vocabulary needs it; "
            "run: pip install 'onnx_intq[bpe]'"
        ) from error
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise IntqError(
            f"tokenizer is no SentencePiece model ({first_line(error)}); expected the .model file "
            "that it was trained to; save the model with NeMo again"
        ) from error
    return tuple(processor.IdToPiece(number) for number in range(processor.GetPieceSize()))
