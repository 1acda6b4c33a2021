"""What ``generate`` takes and gives.

Request     -- a prompt and what the answer must contain
Generation  -- an answer
Stats       -- what a batch cost, beside the limits of the machine
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmtok.blocks import is_int
from mmtok.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """One answer to generate.

    Attributes:
        prompt: integers [n], from <bos> to a point between segments where the answer begins: ``<bos> <user> ...
            <assistant>``.
        targets: the segments of the answer, in order: modalities, or names of tokenizers. Empty: the model chooses.
        max_new_tokens: most ids after the prompt, the final <eos> included.
        grid: exact image size (h, w) in codes; None: the model chooses.
        max_frames: largest length of an audio segment, in frames.
        sample: with the seed this gives the row its chance; number them to get several answers to one prompt.
    """

    prompt: np.ndarray
    targets: tuple[str, ...] = ()
    max_new_tokens: int = 512
    grid: tuple[int, int] | None = None
    max_frames: int | None = None
    sample: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise ConfigError(f"targets {self.targets!r}, expected a tuple of modalities or tokenizers")
        for name, value in (("max_new_tokens", self.max_new_tokens), ("sample", self.sample)):
            if not is_int(value) or value < 0:
                raise ConfigError(f"{name} is {value!r}, expected a whole number from 0 up")


@dataclass(frozen=True)
class Stats:
    """What a call of ``generate`` cost, all rows together.

    Attributes:
        new_tokens: ids after the prompts.
        prompt_tokens: ids of the prompts.
        steps: runs of the model after the prompts.
        prefill_seconds: until the model has seen the prompts, but for their last ids.
        decode_seconds: the rest.
        weight_bytes: read by these ``steps``.
        flops: of the matrix products with weights in these ``steps``.
    """

    new_tokens: int
    prompt_tokens: int
    steps: int
    prefill_seconds: float
    decode_seconds: float
    weight_bytes: int
    flops: int

    @property
    def tokens_per_second(self) -> float:
        """New ids per second of decoding."""
        return self.new_tokens / max(self.decode_seconds, 1e-9)

    def __str__(self) -> str:
        seconds = max(self.decode_seconds, 1e-9)
        return (
            f"{self.new_tokens} tokens, prefill {self.prefill_seconds:.2f} s for {self.prompt_tokens}, "
            f"decode {self.decode_seconds:.2f} s: {self.tokens_per_second:.0f} tok/s, "
            f"{self.weight_bytes / seconds / 1e9:.1f} GB/s of weights, {self.flops / seconds / 1e9:.1f} GFLOP/s"
        )


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        ids: int64 [n], the whole document, <bos> to <eos>.
        prompt_length: how many of the ids are the prompt.
        tokens: how many of the new ids are of each modality: text, image, audio, grid, control.
        stats: of the whole batch.
    """

    ids: np.ndarray
    prompt_length: int
    tokens: dict[str, int]
    stats: Stats

    @property
    def new_ids(self) -> np.ndarray:
        """int64 [m], the ids after the prompt, <eos> included."""
        return self.ids[self.prompt_length :]
