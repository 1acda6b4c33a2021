"""Grammar-constrained generation: whatever the weights, every result is a document that decodes.

generate   -- requests of any lengths and targets in one batch -> one Generation each
Run        -- the same step by step, for streams

The grammar's mask knows the segments asked for and the tokens left. Only the blocks of the vocabulary that some row may
take are multiplied, and runs of ids that leave no choice skip the model: they are fed together with the next id that
does. Prompts that several rows share are run once.

A row with guidance gets a twin when its first image or sound opens: the same answer to the prompt without its question.
Twins are rows like others, so that one run of the model serves both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtok.errors import ConfigError, SequenceError
from mmtok.grammar import Grammar, GrammarState, Restriction, Restrictions
from mmtok.registry import VocabularyRegistry
from mmtok.transformer.cache import KVCache
from mmtok.transformer.columns import Vocabulary
from mmtok.transformer.decoder import Decoder
from mmtok.transformer.model import Transformer
from mmtok.transformer.requests import Generation as Generation
from mmtok.transformer.requests import Request as Request
from mmtok.transformer.requests import Stats as Stats
from mmtok.transformer.sampling import Sampler, Sampling, uniforms

DEFAULT = Sampling()


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
        ConfigError: the tokens allowed cannot hold the targets, prompt and answer outgrow the positions, or guidance
            for text.
        SequenceError: a prompt that is not valid up to a point between segments.
        VocabularyError: an id or a target that is not in the vocabulary; transformer and grammar that do not fit.
    """
    if not requests:
        return []
    run = Run(model, grammar, requests, sampling, seed)
    while run.going:
        for index, id in run.step():
            if on_token is not None:
                on_token(index, id)
    return run.generations()


class Rows(NamedTuple):
    """The state of the rows that are computed."""

    state: GrammarState
    limits: Restrictions
    left: Tensor  # int64 [B]: ids that may still be emitted
    asked: Tensor  # bool [B]: the request names its targets
    chance: Tensor  # float [B, N]: a number for each step
    seen: Tensor | None  # bool [B, V]: the codes that the row's segment holds, for a repetition penalty

    def select(self, index: Tensor) -> Rows:
        """These rows only."""
        state = GrammarState(*(x[index] for x in self.state))
        seen = None if self.seen is None else self.seen[index]
        return Rows(state, self.limits.select(index), self.left[index], self.asked[index], self.chance[index], seen)


def _start(grammar: Grammar, requests: Sequence[Request], seed: int, device: torch.device, penalises: bool) -> Rows:
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
    seen = None
    if penalises:
        seen = torch.zeros(len(requests), grammar.registry.padded_size, dtype=torch.bool, device=device)
    return Rows(
        state,
        limits,
        torch.tensor([r.max_new_tokens for r in requests], device=device),
        torch.tensor([bool(r.targets) for r in requests], device=device),
        uniforms(seed, [r.sample for r in requests], longest).to(device),
        seen,
    )


def without_question(registry: VocabularyRegistry, prompt: np.ndarray) -> list[int]:
    """The prompt that guidance compares with: the last question is empty, what went before stays.

    That is everything up to the last <user>, and <assistant>; of a prompt without a <user>, <bos> alone.
    """
    users = np.flatnonzero(prompt == registry.user)
    return [*prompt[: users[-1] + 1].tolist(), registry.assistant] if len(users) else [registry.bos]


class Run:
    """One batch, step by step; arguments and errors as of ``generate``.

    Attributes:
        going: some row has not ended.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Transformer | Decoder,
        grammar: Grammar,
        requests: Sequence[Request],
        sampling: Sampling | Mapping[str, Sampling] = DEFAULT,
        seed: int = 0,
    ) -> None:
        started = time.perf_counter()
        self._decoder = model if isinstance(model, Decoder) else Decoder(model, model.head_weight.dtype)
        self._decoder.check_vocabulary(grammar.registry)
        self._grammar, self._requests = grammar, list(requests)
        device, registry = self._decoder.device, grammar.registry
        self._sampler = Sampler(sampling, device)
        prompts = [np.asarray(r.prompt) for r in requests]
        self._unasked = [without_question(registry, p) for p in prompts] if self._sampler.guides else []
        longest = [*map(len, prompts), *map(len, self._unasked)]
        # Finished rows are parked at slot 0, so no row needs more than its own prompt and answer.
        most = [r.max_new_tokens for r in requests] * (2 if self._unasked else 1)
        capacity = max(n + m for n, m in zip(longest, most, strict=True))
        self._decoder.check_capacity(capacity)
        self._rows = _start(grammar, requests, seed, device, self._sampler.penalises)
        self._vocabulary = Vocabulary(registry, device)
        openings = [registry.opening(t.name) for t in registry.tokenizers if t.modality != "text"]
        self._leave = torch.zeros(registry.padded_size, dtype=torch.bool)
        self._leave[[registry.eos, *openings]] = True
        self._leave = self._leave.to(device)  # the ids that end a text
        self._live = list(range(len(requests)))  # the request of each row
        self._done = [False] * len(requests)
        self._twins: list[int] = []  # the row of each twin; twins stand behind all rows in the cache
        self._answers: list[list[int]] = [[] for _ in requests]
        self._steps = self._step = self._bytes = self._flops = 0
        self._cache = self._decoder.new_cache(0, capacity)
        self._cache.join(self._prefill([p[:-1].tolist() for p in prompts]))
        self._pending = [p[-1:].tolist() for p in prompts]  # ids that the model has not seen, of rows and twins
        self._prefill_seconds, self._decode_seconds = time.perf_counter() - started, 0.0

    @property
    def going(self) -> bool:
        """Some row has not ended."""
        return not all(self._done)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """One more id in each row that has not ended: (index of the request, id)."""
        started, rows, before = time.perf_counter(), self._rows, self._done
        ids = self._next()
        self._step += 1
        state = self._grammar.advance(rows.state, ids)
        if rows.seen is not None:
            rows.seen.logical_and_((state.stage == rows.state.stage)[:, None])
            rows.seen[torch.arange(len(ids), device=ids.device), ids] = self._vocabulary.content[ids]
        self._rows = rows._replace(state=state, left=rows.left - 1)
        out = []
        chosen = ids.tolist()
        for slot, id in enumerate(chosen):
            if not before[slot]:
                self._answers[self._live[slot]].append(id)
                out.append((self._live[slot], id))
        for pending, slot in zip(self._pending, (*range(len(chosen)), *self._twins), strict=True):
            pending.append(chosen[slot])
        self._done = state.done.tolist()
        self._shrink()
        self._decode_seconds += time.perf_counter() - started
        return out

    def generations(self) -> list[Generation]:
        """The answers, once all rows have ended."""
        prompts, new = sum(len(r.prompt) for r in self._requests), sum(map(len, self._answers))
        seconds = self._prefill_seconds, self._decode_seconds
        stats = Stats(new, prompts, self._steps, *seconds, self._bytes, self._flops)
        registry, out = self._grammar.registry, []
        for request, answer in zip(self._requests, self._answers, strict=True):
            ids = np.concatenate([np.asarray(request.prompt, np.int64), np.array(answer, np.int64)])
            blocks = registry.split(ids[len(request.prompt) :])[0]
            counts = dict.fromkeys((b.modality for b in registry.blocks), 0)
            for index, n in zip(*np.unique(blocks, return_counts=True), strict=True):
                counts[registry.blocks[index].modality] += int(n)
            out.append(Generation(ids, len(request.prompt), counts, stats))
        return out

    def _next(self) -> Tensor:
        """int64 [B]: the next id of each row."""
        rows, grammar = self._rows, self._grammar
        mask = grammar.mask(rows.state, rows.left, rows.limits)
        may_leave = rows.asked & grammar.in_text(rows.state)
        if not may_leave.any():
            return self._choose(mask)
        # Whatever the model would end a text with, the answer goes on with what was asked for.
        goes_on = mask & self._leave
        may_leave &= goes_on.any(-1) & (mask & ~self._leave).any(-1)
        ids = self._choose(mask | (self._leave & may_leave[:, None]))
        return torch.where(may_leave & self._leave[ids], goes_on.byte().argmax(-1), ids)

    def _choose(self, mask: Tensor) -> Tensor:
        """int64 [B]: one of the ids in each row of the mask, bool [B, V]."""
        vocabulary, rows = self._vocabulary, self._rows
        allowed = mask[:, vocabulary.probes]
        choice = (allowed * vocabulary.sizes).sum(-1) > 1
        sole = vocabulary.probes[allowed.byte().argmax(-1)]
        if not choice.any():
            return sole
        modality = self._grammar.modality(rows.state)
        if self._sampler.guides:
            self._add_twins((self._sampler.guided[modality] & choice).tolist())
        columns = vocabulary.columns((allowed & choice[:, None]).any(0))
        hidden = self._forward()
        parts = [self._decoder.logits(hidden, part) for part in columns.slices]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        self._count(*logits.shape)
        here, given = columns.of(mask), logits[: len(mask)]
        if self._twins:
            of = list(range(len(mask)))  # a row without a twin is its own
            for twin, slot in enumerate(self._twins, len(mask)):
                of[slot] = twin
            given = self._sampler.guide(given, logits[of], here, columns.codes, modality)
        seen = None if rows.seen is None else columns.of(rows.seen)
        chosen = self._sampler(given, here, modality, rows.chance[:, self._step], seen)
        return torch.where(choice, columns.ids[chosen.clamp(max=len(columns.ids) - 1)], sole)

    def _forward(self) -> Tensor:
        """[R, C]: run what the model has not seen; the output at the last id of each row and each twin."""
        hidden = self._feed(self._pending, self._cache)
        lengths = [len(p) for p in self._pending]
        self._pending = [[] for _ in lengths]
        if min(lengths) == max(lengths):
            return hidden[:, -1]
        return hidden[torch.arange(len(lengths), device=hidden.device), torch.tensor(lengths, device=hidden.device) - 1]

    def _feed(self, rows: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """[R, T, C]: run rows of ids, of any lengths, behind what the cache holds."""
        lengths, before = [len(row) for row in rows], cache.lengths
        longest, pad = max(lengths), self._grammar.registry.pad
        equal = min(lengths) == longest
        ids = torch.tensor(rows if equal else [[*row, *[pad] * (longest - len(row))] for row in rows])
        hidden = self._decoder.hidden(ids.to(self._decoder.device), cache)
        if not equal:
            cache.rewind([b + n for b, n in zip(before, lengths, strict=True)])
        return hidden

    def _prefill(self, rows: Sequence[Sequence[int]]) -> KVCache:
        """A cache that holds these ids; rows that are equal are run once."""
        unique = {tuple(row): i for i, row in enumerate(dict.fromkeys(map(tuple, rows)))}
        cache = self._decoder.new_cache(len(unique), max(map(len, rows)))
        if any(unique):
            self._feed(list(unique), cache)
        cache.select([unique[tuple(row)] for row in rows])
        return cache

    def _add_twins(self, guided: list[bool]) -> None:
        """Give a twin to each row that is to be guided and has none."""
        new = [slot for slot, on in enumerate(guided) if on and slot not in self._twins]
        if not new:
            return
        seen = []
        for slot in new:
            request = self._live[slot]
            ids = [*self._unasked[request], *self._answers[request]]
            count = len(ids) - len(self._pending[slot])
            seen.append(ids[:count])
            self._pending.append(ids[count:])
        self._cache.join(self._prefill(seen))
        self._twins += new

    def _shrink(self) -> None:
        """Park finished rows; drop them once they are half of the batch."""
        alive = [slot for slot, ended in enumerate(self._done) if not ended]
        if len(alive) in (0, len(self._done)):
            return
        ended = [self._done[slot] for slot in (*range(len(self._done)), *self._twins)]
        if 2 * len(alive) > len(self._done):
            self._cache.rewind([0 if end else n for n, end in zip(self._cache.lengths, ended, strict=True)])
            return
        kept = [row for row, end in enumerate(ended) if not end]
        self._rows = self._rows.select(torch.tensor(alive, device=self._decoder.device))
        self._cache.select(kept)
        self._pending = [self._pending[row] for row in kept]
        self._live = [self._live[slot] for slot in alive]
        self._twins = [alive.index(slot) for slot in self._twins if not self._done[slot]]
        self._done = [False] * len(alive)

    def _count(self, rows: int, columns: int) -> None:
        """Account for a run of the model."""
        read, flops = self._decoder.cost(rows, columns)
        self._steps += 1
        self._bytes += read
        self._flops += flops
