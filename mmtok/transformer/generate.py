"""Grammar-constrained generation: whatever the weights, every result is a document that decodes.

Request    -- a prompt and what the answer must contain
generate   -- requests of any lengths and targets in one batch -> one Generation each
Stats      -- what the batch cost, beside the limits of the machine

Each step the grammar's mask (which knows the tokens left) meets a gate (which knows the segments asked for, and keeps
room for those still to come). Only the columns of the output projection that some row may take are multiplied, and
runs of ids that leave no choice skip the model: they are fed together with the next id that does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtok.errors import ConfigError, SequenceError
from mmtok.grammar import Grammar, GrammarState, Restriction, Restrictions
from mmtok.registry import VocabularyRegistry
from mmtok.transformer.cache import KVCache
from mmtok.transformer.decoder import Decoder
from mmtok.transformer.model import Transformer
from mmtok.transformer.sampling import Sampler, Sampling, uniforms

OPEN, ENDING = 0, 1  # gates: anything; <eos>
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
    """The state of the rows that are computed; S is one more than the most targets of a request."""

    state: GrammarState
    limits: Restrictions
    left: Tensor  # int64 [B]: ids that may still be emitted
    stage: Tensor  # int64 [B]: the target being filled, then the end
    begun: Tensor  # bool [B]: in a text target that has its first id
    gates: Tensor  # int64 [B, S]: the gate of each stage
    is_text: Tensor  # bool [B, S]: the stage is a text target
    reserve: Tensor  # int64 [B, S]: ids to keep for the stages after
    entry: Tensor  # int64 [B, S]: the id that a stage begins with, if it has no choice
    chance: Tensor  # float [B, N]: a number for each step

    def select(self, index: Tensor) -> Rows:
        """These rows only."""
        return _select(self, index)


def _select(tree: Any, index: Tensor) -> Any:
    return tree[index] if isinstance(tree, Tensor) else type(tree)(*(_select(x, index) for x in tree))


class Plan:
    """What the targets of a batch of requests mean as tensors: gates, and which ids begin and end a target."""

    def __init__(self, grammar: Grammar, requests: Sequence[Request], seed: int, device: torch.device) -> None:
        registry = grammar.registry
        self.registry = registry
        size = registry.padded_size
        text = np.zeros(size, bool)
        for block in registry.blocks:
            if block.modality == "text":
                text[block.start : block.end] = True
        media = [t.name for t in registry.tokenizers if t.modality != "text"]
        openings = [registry.opening(name) for name in media]
        closes = np.zeros(size, bool)
        closes[[registry.closing(name) for name in media]] = True
        ending = np.zeros(size, bool)
        ending[[registry.eos, registry.pad]] = True
        gates = [np.ones(size, bool), ending]
        known: dict[str, int] = {}
        stages = max(len(r.targets) for r in requests) + 1
        shape = (len(requests), stages)
        gate, entry = np.full(shape, ENDING), np.full(shape, registry.eos)
        is_text, reserve = np.zeros(shape, bool), np.zeros(shape, np.int64)
        for i, request in enumerate(requests):
            costs = _check(grammar, i, request)
            if not request.targets:
                gate[i] = OPEN
            for j, target in enumerate(request.targets):
                spec = registry.tokenizer(target)
                is_text[i, j] = spec.modality == "text"
                if spec.modality != "text":
                    entry[i, j] = registry.opening(spec.name)
                reserve[i, j] = sum(costs[j + 1 : -1])  # the grammar keeps room for <eos> itself
                if spec.name not in known:
                    known[spec.name] = len(gates)
                    allowed = text.copy()
                    if spec.modality != "text":
                        allowed = ~text
                        allowed[[registry.eos, *openings]] = False
                        allowed[entry[i, j]] = True
                    gates.append(allowed)
                gate[i, j] = known[spec.name]

        def put(x: Any) -> Tensor:
            return torch.as_tensor(np.asarray(x)).to(device)

        self.text, self.closes, self.gates = put(text), put(closes), put(np.stack(gates))
        count = len(requests)
        longest = max(r.max_new_tokens for r in requests)
        state = grammar.resume([r.prompt for r in requests], device)
        for i, between in enumerate(state.between.tolist()):
            if not between:
                end = len(requests[i].prompt)
                raise SequenceError(end, f"the end of the prompt of request {i}", "a prompt that ends between segments")
        self.rows = Rows(
            state=state,
            limits=grammar.restrict([_restriction(registry, r) for r in requests], device),
            left=put([r.max_new_tokens for r in requests]),
            stage=torch.zeros(count, dtype=torch.int64, device=device),
            begun=torch.zeros(count, dtype=torch.bool, device=device),
            gates=put(gate),
            is_text=put(is_text),
            reserve=put(reserve),
            entry=put(entry),
            chance=uniforms(seed, [r.sample for r in requests], longest).to(device),
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
        self.plan = Plan(grammar, requests, seed, decoder.device)
        self.rows = self.plan.rows
        self.live = list(range(len(requests)))  # the request of each row
        self.pending = [np.asarray(r.prompt).tolist() for r in requests]  # ids that the model has not seen
        self.answers: list[list[int]] = [[] for _ in requests]
        self.control = grammar.registry.blocks[0].end
        # Finished rows are parked at slot 0, so no row needs more than its own prompt and answer.
        self.capacity = max(len(r.prompt) + r.max_new_tokens for r in requests)
        self.cache: KVCache = decoder.new_cache(len(requests), self.capacity)
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
            self.rows, ids = self._advance(ids)
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
        rows, batch = self.rows, torch.arange(len(self.live), device=self.decoder.device)
        stage = rows.stage
        gate = rows.gates[batch, stage].masked_fill(rows.begun, OPEN)
        mask = self.grammar.mask(rows.state, rows.left - rows.reserve[batch, stage], rows.limits)
        mask = mask & self.plan.gates[gate]
        columns = mask.any(0).nonzero()[:, 0]
        if len(columns) == 1 or bool((mask.sum(-1) == 1).all()):
            return mask.byte().argmax(-1)
        hidden = self._forward()
        control = self.control if int(columns[0]) < self.control else 0
        low, high = int(columns[torch.searchsorted(columns, control)]), int(columns[-1]) + 1
        logits, mask_used = self.decoder.logits(hidden, slice(low, high)), mask[:, low:high]
        if control:
            logits = torch.cat((self.decoder.logits(hidden, slice(0, control)), logits), -1)
            mask_used = torch.cat((mask[:, :control], mask_used), -1)
        self._count(len(self.live), logits.shape[-1])
        chosen = self.sampler(logits, mask_used, self.grammar.modality(rows.state), rows.chance[:, step])
        return torch.where(chosen < control, chosen, chosen + (low - control))

    def _forward(self) -> Tensor:
        """[B, C]: run what the model has not seen; the output at the last id of each row."""
        lengths = [len(p) for p in self.pending]
        longest = max(lengths)
        before = self.cache.lengths
        ids = torch.tensor([p + [self.plan.registry.pad] * (longest - len(p)) for p in self.pending])
        hidden = self.decoder.hidden(ids.to(self.decoder.device), self.cache)
        self.pending = [[] for _ in self.pending]
        if min(lengths) == longest:
            return hidden[:, -1]
        self.cache.rewind([b + n for b, n in zip(before, lengths, strict=True)])
        return hidden[torch.arange(len(lengths), device=hidden.device), torch.tensor(lengths, device=hidden.device) - 1]

    def _advance(self, ids: Tensor) -> tuple[Rows, Tensor]:
        """Move every row on by its id; a row that leaves a text target gets the id that begins the next."""
        rows, batch = self.rows, torch.arange(len(self.live), device=ids.device)
        in_text = rows.is_text[batch, rows.stage]
        leaves = rows.begun & ~self.plan.text[ids]
        after = rows.stage + leaves
        ids = torch.where(leaves, rows.entry[batch, after], ids)
        filled = self.plan.closes[ids] & (rows.gates[batch, after] > ENDING)
        state = self.grammar.advance(rows.state, ids)
        return rows._replace(state=state, left=rows.left - 1, stage=after + filled, begun=in_text & ~leaves), ids

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


def _restriction(registry: VocabularyRegistry, request: Request) -> Restriction:
    """A request for audio is not answered by no audio at all."""
    asked = any(registry.tokenizer(t).modality == "audio" for t in request.targets)
    return Restriction(grid=request.grid, min_frames=int(asked), max_frames=request.max_frames)


def _check(grammar: Grammar, index: int, request: Request) -> list[int]:
    """The least number of ids that each target and the <eos> take; raises if the limit is too low."""
    registry = grammar.registry
    costs = []
    for before, target in zip((None, *request.targets), request.targets, strict=False):
        spec = registry.tokenizer(target)
        if spec.modality == "text":
            if before is not None and registry.tokenizer(before).modality == "text":
                raise ConfigError(f"request {index}: two text targets in a row are one; give {target!r} once")
            costs.append(1)
        elif spec.modality == "image":
            height, width = request.grid or (1, 1)
            costs.append(4 + height * width)
        else:
            costs.append(2 + len(spec.codebook_sizes))
    costs.append(1)
    if request.max_new_tokens < sum(costs):
        what = " + ".join((*request.targets, "<eos>"))
        raise ConfigError(
            f"request {index}: max_new_tokens is {request.max_new_tokens}, expected at least {sum(costs)} for {what}"
        )
    return costs
