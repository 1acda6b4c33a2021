"""The grammar once more, slowly and plainly, and random registries, documents and restrictions: for several tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from hypothesis import strategies as st

from mmtok.errors import VocabularyError
from mmtok.grammar import Grammar, GrammarState, Restriction, Restrictions
from mmtok.layouts import Layout
from mmtok.registry import MODALITIES, TokenizerSpec, VocabularyRegistry

State = tuple
Document = list[tuple[str, object]]  # (tokenizer or turn token, codes)
MOST_FRAMES = 10  # no sound of these tests is longer


@functools.cache
def audio_prefixes(layout: Layout) -> tuple[frozenset[tuple[int, ...]], dict[tuple[int, ...], int]]:
    """All beginnings of streams of levels (-1 for a fill) of so many frames, and the frames of the whole ones."""
    whole = {tuple(layout.levels(frames).tolist()): frames for frames in range(MOST_FRAMES)}
    return frozenset(levels[:i] for levels in whole for i in range(len(levels) + 1)), whole


class Plain:
    """One row and one id at a time, with the shortest way to the end by search.

    A state is a kind, then what belongs to it, then the number of segments begun, up to 3.
    """

    def __init__(self, registry: VocabularyRegistry) -> None:
        self.r = registry
        self.openings = {registry.opening(t.name): t for t in registry.tokenizers if t.modality != "text"}
        self.fills = {registry.fill(t.name): t.name for t in registry.tokenizers if t.layout.startswith("delayed")}
        self.shortest = functools.cache(self._shortest)
        self.successors = functools.cache(self._successors)

    def fresh(self, state: State) -> State:
        """The state as ``resume`` gives it: no segment counted, and text begins anew."""
        return ("body", "", 0) if state[0] == "body" else (*state[:-1], 0)

    def step(self, state: State, id: int) -> State | None:
        r = self.r
        try:
            (index,), (code,) = r.split([id])
        except VocabularyError:
            return None
        block = r.blocks[index]
        kind, stage = state[0], state[-1]
        begun = min(stage + 1, 3)
        if kind == "start":
            return ("body", "", stage) if id == r.bos else None
        if kind == "body":
            if id in self.openings:
                t = self.openings[id]
                return ("height", t.name, begun) if t.modality == "image" else ("audio", t.name, (), begun)
            if id == r.eos:
                return ("done", 0)
            if block.modality == "text":
                return ("body", block.tokenizer, stage if state[1] == block.tokenizer else begun)
            return ("body", "", stage) if id in (r.user, r.assistant) else None
        if kind == "done":
            return state if id == r.pad else None
        name = state[1]
        if kind == "height":
            return ("width", name, int(code) + 1, stage) if block.modality == "grid" else None
        if kind == "width":
            size = state[2] * (int(code) + 1) * len(r.tokenizer(name).codebook_sizes)
            return ("codes", name, size, stage) if block.modality == "grid" else None
        if kind == "codes":
            if block.tokenizer != name or block.codebook != -state[2] % len(r.tokenizer(name).codebook_sizes):
                return None
            return ("codes", name, state[2] - 1, stage) if state[2] > 1 else ("close", name, stage)
        if kind == "close":
            return ("body", "", stage) if id == r.closing(name) else None
        seen = state[2]
        prefixes, whole = audio_prefixes(r.tokenizer(name).codebook_layout)
        if id == r.closing(name):
            return ("body", "", stage) if seen in whole else None
        if self.fills.get(id) == name:
            seen = (*seen, -1)
        elif block.tokenizer == name:
            seen = (*seen, block.codebook)
        else:
            return None
        return ("audio", name, seen, stage) if seen in prefixes else None

    def permitted(self, state: State, id: int, restriction: Restriction | None) -> bool:
        r, stage = restriction, state[-1]
        if r is None:
            return True
        if state[0] == "body":
            block = self.r.blocks[self.r.split([id])[0][0]]
            name = self.openings[id].name if id in self.openings else block.tokenizer
            if id == self.r.eos:
                return stage >= len(r.next)
            if not name or (id not in self.openings and name == state[1]):
                return bool(name)
            if stage < len(r.next):
                return self.r.tokenizer(r.next[stage]).name == name
            return not r.stop and self.r.tokenizer(name).modality in r.modalities
        if state[0] in ("height", "width") and r.grid:
            return self.r.split([id])[1][0] + 1 == r.grid[state[0] == "width"]
        if state[0] == "audio" and id == self.r.closing(state[1]):
            spec = self.r.tokenizer(state[1])
            least, most = r.frames(spec)
            return least <= audio_prefixes(spec.codebook_layout)[1][state[2]] <= most
        return True

    def _successors(self, state: State) -> list[tuple[int, State]]:
        steps = [(id, self.step(state, id)) for id in range(self.r.padded_size)]
        return [(id, after) for id, after in steps if after is not None]

    def following(self, state: State, restriction: Restriction | None) -> Iterator[tuple[int, State]]:
        return ((id, after) for id, after in self.successors(state) if self.permitted(state, id, restriction))

    def _shortest(self, state: State, restriction: Restriction | None) -> float:
        """Ids to <eos>, by breadth-first search; infinite if there is no way."""
        seen, front, length = {state}, [state], 0
        while ("done", 0) not in seen:
            front = list({after for s in front for _, after in self.following(s, restriction)} - seen)
            seen.update(front)
            length += 1
            if not front:
                return np.inf
        return length

    def mask(self, state: State, budget: int | None, restriction: Restriction | None) -> set[int]:
        shortest = self.shortest(state, restriction)
        left = max(1e9 if budget is None else budget, shortest) - 1
        return {i for i, after in self.following(state, restriction) if self.shortest(after, restriction) <= left}

    def run(self, ids: np.ndarray) -> list[State]:
        """The states before each id and after the last, cut where an id is forbidden."""
        states: list[State] = [("start", 0)]
        for id in ids:
            after = self.step(states[-1], int(id))
            if after is None:
                break
            states.append(after)
        return states


@functools.cache
def cached(registry: VocabularyRegistry) -> tuple[Grammar, Plain]:
    return Grammar(registry), Plain(registry)


@st.composite
def layouts(draw: st.DrawFn, k: int) -> str:
    """The name of a layout of k codebooks."""
    slots = st.lists(st.integers(0, k - 1), max_size=3).flatmap(lambda more: st.permutations([*range(k), *more]))
    rates = st.lists(st.integers(1, 3), min_size=k, max_size=k).filter(lambda r: set(r) != {1})
    delays = st.lists(st.integers(0, 3), min_size=k, max_size=k)
    kind = draw(
        st.sampled_from(["interleaved", "codebook-major", "codebook-major:", "delayed:", "delayed:", "multi-rate:"])
    )
    numbers = {"codebook-major:": rates, "delayed:": delays, "multi-rate:": slots}
    return kind + (",".join(map(str, draw(numbers[kind]))) if kind in numbers else "")


@st.composite
def registries(draw: st.DrawFn, most: int = 5, levels: int = 3) -> VocabularyRegistry:
    def specs(prefix: str, most: int) -> list[TokenizerSpec]:
        out = []
        modalities = draw(st.lists(st.sampled_from([*MODALITIES, "image", "audio"]), max_size=most))
        modalities += draw(st.sampled_from([[], ["audio"], ["audio", "audio"], ["image"], ["image", "text", "audio"]]))
        for i, modality in enumerate(modalities):
            k = 1 if modality == "text" else draw(st.integers(1, levels))
            sizes = tuple(draw(st.integers(1, 3)) for _ in range(k))
            layout = draw(layouts(k)) if modality == "audio" else ""
            out.append(
                TokenizerSpec(f"{prefix}{i}", modality, sizes, f"{prefix}{i}", draw(st.integers(0, 1)), layout=layout)
            )
        return out

    grid, pad = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4]))
    registry = VocabularyRegistry.create(specs("a", most), max_grid=grid, pad_multiple=pad)
    return registry.extend(specs("b", 2)) if draw(st.booleans()) else registry


@st.composite
def documents(draw: st.DrawFn, registry: VocabularyRegistry) -> Document:
    names = [*(t.name for t in registry.tokenizers), "<user>", "<assistant>"]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out: Document = []
    for name in draw(st.lists(st.sampled_from(names), min_size=draw(st.integers(0, 4)), max_size=6)):
        if name.startswith("<"):
            out.append((name, np.zeros(0, np.int64)))
            continue
        spec = registry.tokenizer(name)
        if spec.modality == "audio":
            rates, frames = spec.codebook_layout.rates, draw(st.integers(0, 4))
            levels = [
                rng.integers(0, size, rate * frames) for size, rate in zip(spec.codebook_sizes, rates, strict=True)
            ]
            codes = np.stack(levels) if set(rates) == {1} else tuple(levels)
        else:
            side, k = st.integers(1, registry.max_grid), len(spec.codebook_sizes)
            shape = (draw(st.integers(1, 4)),) if spec.modality == "text" else (draw(side), draw(side), k)
            codes = rng.integers(0, spec.codebook_sizes, shape)
            codes = codes[..., 0] if len(shape) == 3 and k == 1 else codes
        if not (spec.modality == "text" and out and out[-1][0] == name):  # neighbours of one tokenizer are one text
            out.append((name, codes))
    return out


def to_ids(grammar: Grammar, document: Document, padding: int = 0) -> np.ndarray:
    r = grammar.registry
    parts = [[r.control(name)] if name.startswith("<") else grammar.segment_ids(name, c) for name, c in document]
    return np.concatenate([[r.bos], *parts, [r.eos], [r.pad] * padding]).astype(np.int64)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Grammar, Plain, Document, np.ndarray]:
    grammar, plain = cached(draw(registries()))
    document = draw(documents(grammar.registry))
    return grammar, plain, document, to_ids(grammar, document, draw(st.integers(0, 2)))


@st.composite
def restrictions(draw: st.DrawFn, registry: VocabularyRegistry) -> Restriction | None:
    side = st.integers(1, registry.max_grid)
    least = draw(st.integers(0, 3))
    names = [t.name for t in registry.tokenizers]
    following = st.lists(st.sampled_from(names), max_size=2).map(tuple) if names else st.just(())
    return draw(
        st.one_of(
            st.none(),
            st.builds(
                Restriction,
                modalities=st.lists(st.sampled_from(MODALITIES), unique=True).map(tuple),
                next=following.filter(lambda n: len(n) < 2 or n[0] != n[1]),
                stop=st.booleans(),
                grid=st.one_of(st.none(), st.tuples(side, side)),
                min_frames=st.just(least),
                max_frames=st.one_of(st.none(), st.integers(least, 4)),
            ),
        )
    )


def sample(
    grammar: Grammar, limits: Restrictions, budget: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, GrammarState]:
    """Rows drawn from random scores of any sharpness, to the end of the longest: ids [B, n], and the last state."""
    batch, size = len(budget), grammar.registry.padded_size
    sharpness = 10 ** torch.empty(batch, 1).uniform_(-1, 2, generator=generator)
    bias = torch.randn(batch, size, generator=generator) * sharpness
    state, left, out = grammar.initial(batch), budget.clone(), []
    while not bool(state.done.all()):
        mask = grammar.mask(state, left, limits)
        logits = bias + torch.randn(mask.shape, generator=generator)
        ids = logits.masked_fill(~mask, -torch.inf).argmax(-1)
        state = grammar.advance(state, ids)
        out.append(ids)
        left = left - 1
    return torch.stack(out, 1), state
