"""How a model is trained: what the options of `train` say."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from onnx_intq.transform import IntqError

WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""
LOWEST = 0.02
"""The last learning rate, as a share of the highest."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options of a training.

    Attributes:
        method: "gq", "s8bqat", "uniform", or "none" for no training at all.
        bits: Width of the weights, where neither `overrides` nor `budget` says another.
        overrides: (glob pattern of node names, width) pairs; the last that matches wins.
        budget: Bits of all weights together as a share of 8 each; None for `bits`.
        steps: Steps of AdamW.
        batch_size: Utterances or rows per step, of all processes together.
        rate: Learning rate of the quantizers' parameters; others have multiples of it.
        task: Factor of the loss on transcripts.
        distill: Factor of the divergence from the float model.
        seconds: Longest utterance; longer ones are left out, or cropped without transcripts.
        quantize_every: Steps between two quantizations of the weights.
        validate_every: Steps between two validations.
        held_out: Share of the data that is validated on.
        seed: Of everything random.
        bfloat16: Whether products and convolutions of a training step have such operands: faster
            where the processor has them. Validation is in float32.

    Raises:
        IntqError: Both losses are switched off.
    """

    method: str = "gq"
    bits: int = 5
    overrides: tuple[tuple[str, int], ...] = ()
    budget: float | None = None
    steps: int = 400
    batch_size: int = 8
    rate: float = 1e-3
    task: float = 1.0
    distill: float = 1.0
    seconds: float = 17.0
    quantize_every: int = 1
    validate_every: int = 25
    held_out: float = 0.1
    seed: int = 0
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if not self.task and not self.distill:
            raise IntqError(
                "neither a loss on transcripts nor distillation; expected one of them; give --task "
                "or --distill above 0"
            )

    def about(self) -> dict[str, object]:
        """For JSON: what a result depends on, besides model and data."""
        return asdict(self)

    def rate_at(self, step: int) -> float:
        """Factor of the learning rates at a step: a linear rise, then half a cosine."""
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.steps - warmup)
        return LOWEST + (1 - LOWEST) * (0.5 + 0.5 * math.cos(math.pi * done))
