"""Grammar-constrained generation: whatever the weights, every result is a document that decodes.

Request    -- a prompt and what the answer must contain
generate   -- requests of any lengths and targets in one batch -> one Generation each
Stats      -- what the batch cost, beside the limits of the machine

The grammar's mask knows the segments asked for and the tokens left. Only the columns of the output projection that some
row may take are multiplied, and runs of ids that leave no choice skip the model: they are fed together with the next id
that does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtok.blocks import is_int
from mmtok.errors import ConfigError, SequenceError
from mmtok.grammar import Grammar, GrammarState, Restriction, Restrictions
from mmtok.transformer.cache import KVCache
from mmtok.transformer.decoder import Decoder
from mmtok.transformer.model import Transformer
from mmtok.transformer.sampling import Sampler, Sampling, uniforms

DEFAULT = Sampling()


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
        steps: runs of the model after the first.
        prefill_seconds: until the first run has seen the prompts.
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


class Rows(NamedTuple):
    """The state of the rows that are computed."""

    state: GrammarState
    limits: Restrictions
    left: Tensor  # int64 [B]: ids that may still be emitted
    asked: Tensor  # bool [B]: the request names its targets
    chance: Tensor  # float [B, N]: a number for each step

    def select(self, index: Tensor) -> Rows:
        """These rows only."""
        state = GrammarState(*(x[index] for x in self.state))
        return Rows(state, self.limits.select(index), self.left[index], self.asked[index], self.chance[index])


def _start(grammar: Grammar, requests: Sequence[Request], seed: int, device: torch.device) -> Rows:
    """The rows after their prompts; raises what ``generate`` raises of requests."""
    audio = {t.name for t in grammar.registry.tokenizers if t.modality == "audio"}
    restrictions = []
    for request in requests:
        asked = any(grammar.registry.tokenizer(t).name in audio for t in request.targets)
        restrictions.append(
            Restriction(
                next=request.targets,
                stop=bool(request.targets),
                grid=request.grid,
                min_frames=int(asked),  # a request for audio is not answered by no audio at all
                max_frames=request.max_frames,
            )
        )
    limits = grammar.restrict(restrictions, device)
    state = grammar.resume([r.prompt for r in requests], device)
    needed = grammar.needed(state, limits).tolist()
    for i, (request, least, between) in enumerate(zip(requests, needed, grammar.between(state).tolist(), strict=True)):
        if not between:
            end = len(request.prompt)
            raise SequenceError(end, f"the end of the prompt of request {i}", "a prompt that ends between segments")
        if request.max_new_tokens < least:
            what = " + ".join((*request.targets, "<eos>"))
            raise ConfigError(
                f"request {i}: max_new_tokens is {request.max_new_tokens}, expected at least {least} for {what}"
            )
    longest = max(r.max_new_tokens for r in requests)
    return Rows(
        state,
        limits,
        torch.tensor([r.max_new_tokens for r in requests], device=device),
        torch.tensor([bool(r.targets) for r in requests], device=device),
        uniforms(seed, [r.sample for r in requests], longest).to(device),
    )


def generate(
    model: Transformer | Decoder,
    grammar: Grammar,
    requests: Sequence[Request],
    sampling: Sampling | Mapping[str, Sampling] = DEFAULT,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Answer requests of any lengths and targets in one batch.

    A row's answer depends on its request, the sampling and the seed, not on the other rows.

    Args:
        model: a transformer over the grammar's vocabulary. A ``Decoder`` saves copying the weights at each call.
        grammar: of the registry that the transformer was trained with.
        requests: what to answer.
        sampling: for everything, or for each of "text", "image", "audio"; text settings also choose between segments.
        seed: any integer; equal seeds give equal answers.
        on_token: called with (index of the request, id) as each new id is known.

    Raises:
        ConfigError: the tokens allowed cannot hold the targets, or prompt and answer outgrow the positions.
        SequenceError: a prompt that is not valid up to a point between segments.
        VocabularyError: an id or a target that is not in the vocabulary; transformer and grammar that do not fit.
    """
    if not requests:
        return []
    started = time.perf_counter()
    with torch.inference_mode():
        decoder = model if isinstance(model, Decoder) else Decoder(model, model.head_weight.dtype)
        decoder.check_vocabulary(grammar.registry)
        run = _Run(decoder, grammar, requests, Sampler(sampling, decoder.device), seed)
        answers = run.finish(on_token)
        stats = run.stats(started, time.perf_counter())
    out = []
    for request, answer in zip(requests, answers, strict=True):
        ids = np.concatenate([np.asarray(request.prompt, np.int64), np.array(answer, np.int64)])
        blocks = grammar.registry.split(ids[len(request.prompt) :])[0]
        counts = dict.fromkeys((b.modality for b in grammar.registry.blocks), 0)
        for index, n in zip(*np.unique(blocks, return_counts=True), strict=True):
            counts[grammar.registry.blocks[index].modality] += int(n)
        out.append(Generation(ids, len(request.prompt), counts, stats))
    return out


class _Run:
    """One call of ``generate``."""

    def __init__(
        self, decoder: Decoder, grammar: Grammar, requests: Sequence[Request], sampler: Sampler, seed: int
    ) -> None:
        self.decoder, self.grammar, self.sampler = decoder, grammar, sampler
        registry = grammar.registry
        # Finished rows are parked at slot 0, so no row needs more than its own prompt and answer.
        self.capacity = max(len(r.prompt) + r.max_new_tokens for r in requests)
        self.cache: KVCache = decoder.new_cache(len(requests), self.capacity)
        self.rows = _start(grammar, requests, seed, decoder.device)
        openings = [registry.opening(t.name) for t in registry.tokenizers if t.modality != "text"]
        leave = torch.zeros(registry.padded_size, dtype=torch.bool)
        leave[[registry.eos, *openings]] = True
        self.leave = leave.to(decoder.device)  # the ids that end a text
        self.live = list(range(len(requests)))  # the request of each row
        self.pending = [np.asarray(r.prompt).tolist() for r in requests]  # ids that the model has not seen
        self.answers: list[list[int]] = [[] for _ in requests]
        self.control = registry.blocks[0].end
        self.prompt_tokens = sum(len(p) for p in self.pending)
        self.prefilled = 0.0
        self.runs = self.bytes = self.flops = 0

    def finish(self, on_token: Callable[[int, int], None] | None) -> list[list[int]]:
        """Step until every row has ended; the new ids of each request."""
        step = 0
        done = [False] * len(self.live)
        while not all(done):
            ids = self._step(step)
            step += 1
            rows = self.rows
            self.rows = rows._replace(state=self.grammar.advance(rows.state, ids), left=rows.left - 1)
            ended = self.rows.state.done.tolist()
            for slot, id in enumerate(ids.tolist()):
                self.pending[slot].append(id)
                if not done[slot]:
                    self.answers[self.live[slot]].append(id)
                    if on_token is not None:
                        on_token(self.live[slot], id)
            done = self._shrink(ended)
        return self.answers

    def _step(self, step: int) -> Tensor:
        """int64 [B]: the next id of each row."""
        rows, grammar = self.rows, self.grammar
        mask = grammar.mask(rows.state, rows.left, rows.limits)
        may_leave = rows.asked & grammar.in_text(rows.state)
        if not may_leave.any():
            return self._choose(mask, step)
        # Whatever the model would end a text with, the answer goes on with what was asked for.
        goes_on = mask & self.leave
        may_leave &= goes_on.any(-1) & (mask & ~self.leave).any(-1)
        ids = self._choose(mask | (self.leave & may_leave[:, None]), step)
        return torch.where(may_leave & self.leave[ids], goes_on.byte().argmax(-1), ids)

    def _choose(self, mask: Tensor, step: int) -> Tensor:
        """int64 [B]: one of the ids in each row of the mask."""
        columns = mask.any(0).nonzero()[:, 0]
        if len(columns) == 1 or bool((mask.sum(-1) == 1).all()):
            return mask.byte().argmax(-1)
        hidden = self._forward()
        control = self.control if int(columns[0]) < self.control <= int(columns[-1]) else 0
        low, high = int(columns[torch.searchsorted(columns, control)]), int(columns[-1]) + 1
        logits, mask_used = self.decoder.logits(hidden, slice(low, high)), mask[:, low:high]
        if control:
            logits = torch.cat((self.decoder.logits(hidden, slice(0, control)), logits), -1)
            mask_used = torch.cat((mask[:, :control], mask_used), -1)
        self._count(len(self.live), logits.shape[-1])
        modality = self.grammar.modality(self.rows.state)
        chosen = self.sampler(logits, mask_used, modality, self.rows.chance[:, step])
        return torch.where(chosen < control, chosen, chosen + (low - control))

    def _forward(self) -> Tensor:
        """[B, C]: run what the model has not seen; the output at the last id of each row."""
        lengths = [len(p) for p in self.pending]
        longest = max(lengths)
        before = self.cache.lengths
        ids = torch.tensor([p + [self.grammar.registry.pad] * (longest - len(p)) for p in self.pending])
        hidden = self.decoder.hidden(ids.to(self.decoder.device), self.cache)
        self.pending = [[] for _ in self.pending]
        if min(lengths) == longest:
            return hidden[:, -1]
        self.cache.rewind([b + n for b, n in zip(before, lengths, strict=True)])
        return hidden[torch.arange(len(lengths), device=hidden.device), torch.tensor(lengths, device=hidden.device) - 1]

    def _shrink(self, done: list[bool]) -> list[bool]:
        """Park finished rows; drop them once they are half of the batch."""
        alive = [slot for slot, ended in enumerate(done) if not ended]
        if len(alive) in (0, len(done)):
            return done
        if 2 * len(alive) <= len(done):
            index = torch.tensor(alive, device=self.decoder.device)
            self.rows = self.rows.select(index)
            self.cache.select(alive)
            self.live = [self.live[slot] for slot in alive]
            self.pending = [self.pending[slot] for slot in alive]
            return [False] * len(alive)
        self.cache.rewind([0 if ended else n for n, ended in zip(self.cache.lengths, done, strict=True)])
        return done

    def _count(self, batch: int, columns: int) -> None:
        """Account for a run of the model."""
        self.runs += 1
        if self.runs == 1:
            self.prefilled = time.perf_counter()
            return
        read, width = self.decoder.body_bytes, self.decoder.itemsize
        read += columns * self.decoder.config.hidden_size * width
        self.bytes += read
        self.flops += 2 * batch * read // width

    def stats(self, started: float, ended: float) -> Stats:
        """What the run cost."""
        middle = self.prefilled or ended
        new = sum(len(a) for a in self.answers)
        steps = max(self.runs - 1, 0)
        return Stats(new, self.prompt_tokens, steps, middle - started, ended - middle, self.bytes, self.flops)
