"""Data and models from one vocabulary to another, each with a proof that nothing changed on the way.

``Translation``         -- the ids of one vocabulary in another; where a codebook layout changed, laid out anew
``migrate_ids``         -- an ids.json
``migrate_dataset``     -- a directory of token shards
``migrate_transformer`` -- a transformer: its embedding rows move, new ones begin as means of old ones
``prove_same``          -- the moved transformer gives the old one's scores
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.blocks import TokenizerSpec, brackets
from mmtok.checkpoints import atomic_directory
from mmtok.comparison import counterpart
from mmtok.datasets.records import Record, find_spans
from mmtok.datasets.shards import SHARD_TOKENS, TokenDataset, check_target, write_dataset
from mmtok.errors import CheckpointError, SequenceError, VocabularyError
from mmtok.grammar import Grammar
from mmtok.registry import VocabularyRegistry
from mmtok.sequences import read_ids, write_ids
from mmtok.transformer.model import Transformer

TABLES = ("model.embed_tokens.weight", "lm_head.weight")  # one row an id
TOLERANCE = 1e-5  # of scores in float32; a matrix of another width may be summed in another order


class Translation:
    """The ids of one vocabulary in another.

    Args:
        old, new: the two vocabularies.

    Attributes:
        table: int64 [old.size], the new id of each old one, -1 where there is none: ``new.remap(old)``.
        relaid: name in ``old`` -> name in ``new`` of the tokenizers whose codebooks are laid out in another way.

    Raises:
        VocabularyError: two old ids would become one.
    """

    def __init__(self, old: VocabularyRegistry, new: VocabularyRegistry) -> None:
        self.old, self.new = old, new
        self.table = new.remap(old)
        targets = {t.name: counterpart(t, new.tokenizers) for t in old.tokenizers}
        self.relaid = {
            name: t.name for name, t in targets.items() if t is not None and _order(t) != _order(old.tokenizer(name))
        }
        self._grammars = (Grammar(old), Grammar(new)) if self.relaid else None
        self._reshaped = [old.opening(name) for name in self.relaid]
        self._known = self.table >= 0
        for name in self.relaid:  # a fill is no code: the new layout has its own
            self._known[[old.control(x) for x in brackets(old.tokenizer(name), old.tokenizers)]] = True
        kept = np.flatnonzero(self.table >= 0)
        self._back = np.full(new.padded_size, -1, np.int64)
        self._back[self.table[kept]] = kept
        if len(lost := kept[self._back[self.table[kept]] != kept]):
            twin = int(self._back[self.table[lost[0]]])
            raise VocabularyError(
                f"{old.describe(int(lost[0]))} and {old.describe(twin)} would both become "
                f"{new.describe(int(self.table[twin]))}; give the new vocabulary a tokenizer for each"
            )

    @property
    def dropped(self) -> tuple[str, ...]:
        """The used ids of the old vocabulary that have no counterpart, in words, a range at a time."""
        words = []
        for block in self.old.blocks:
            lost = block.start + np.flatnonzero(~self._known[block.start : block.end])
            for part in np.split(lost, np.flatnonzero(np.diff(lost) > 1) + 1) if len(lost) else []:
                first, last = int(part[0]), int(part[-1])
                ends = [self.old.describe(x) for x in dict.fromkeys((first, last))]
                words.append(f"{' to '.join(ends)} ({len(part)} ids from {first})")
        return tuple(words)

    def __call__(self, ids: np.ndarray, what: str) -> np.ndarray:
        """A document in the new vocabulary, and proof of it: mapped back it is the old one, or where a layout changed
        the codes are equal span by span.

        Args:
            ids: int64 [n] of the old vocabulary.
            what: the document, for messages.

        Returns:
            int64 [m]; m differs from n where a layout changed.

        Raises:
            VocabularyError: an id without counterpart (its position is named), or a document that would have to be laid
                out anew but breaks the grammar.
        """
        try:
            self.old.split(ids)
        except VocabularyError as error:
            raise VocabularyError(f"{what}, {error}") from error
        missing = np.flatnonzero(~self._known[ids])
        if len(missing):
            at = int(missing[0])
            raise VocabularyError(
                f"{what}, position {at}: {self.old.describe(int(ids[at]))} has no counterpart in the new vocabulary; "
                "add its tokenizer there, or leave the document out"
            )
        if not np.isin(ids, self._reshaped).any():
            new = self.table[ids]
            if not np.array_equal(self._back[new], ids):
                raise VocabularyError(f"{what}: the ids mapped back are not the ids; this is a bug, please report it")
            return new
        return self._lay_out(ids, what)

    def check(self, ids: np.ndarray, new: np.ndarray, what: str) -> None:
        """Compare a stored translation with its source.

        Raises:
            VocabularyError: they differ.
        """
        if not np.array_equal(self(ids, what), new):
            raise VocabularyError(f"{what}: what was stored is not what was migrated; is the disk damaged?")

    def _lay_out(self, ids: np.ndarray, what: str) -> np.ndarray:
        assert self._grammars is not None
        before, after = self._grammars
        try:
            spans = before.spans(ids)
        except SequenceError as error:
            raise VocabularyError(f"{what}, {error}; it cannot be laid out anew") from error
        parts = []
        for span in spans:
            if span.tokenizer not in self.relaid:
                parts.append(self.table[ids[span.start : span.end]])
                continue
            name, codes = self.relaid[span.tokenizer], before.segment_codes(ids, span)
            try:
                parts.append(after.segment_ids(name, codes))
            except VocabularyError as error:
                raise VocabularyError(f"{what}, {span.tokenizer} at {span.start}: {error}") from error
        new = np.concatenate(parts)
        for a, b in zip(spans, after.spans(new), strict=True):
            same = (a.kind, a.name) == (b.kind, b.name)
            if not same or (a.tokenizer and not _equal(before.segment_codes(ids, a), after.segment_codes(new, b))):
                raise VocabularyError(
                    f"{what}: {a.kind} at {a.start} has other codes after migration; this is a bug, please report it"
                )
        return new


@dataclass(frozen=True)
class DataReport:
    """What a migration of ids did.

    Attributes:
        documents: how many, in both vocabularies.
        tokens_before, tokens_after: they differ where a codebook layout changed.
        relaid: names of the tokenizers whose codebook layout changed.
        dropped: ids of the old vocabulary without counterpart, in words; none of them occurs in the data.
    """

    documents: int
    tokens_before: int
    tokens_after: int
    relaid: tuple[str, ...]
    dropped: tuple[str, ...]


def migrate_ids(source: str | Path, target: str | Path, registry: VocabularyRegistry) -> DataReport:
    """Migrate an ids.json; as :func:`migrate_dataset`."""
    old, documents = read_ids(source)
    translate = Translation(old, registry)
    new = [x._replace(ids=translate(x.ids, f"{source}: document {i} ({x.name})")) for i, x in enumerate(documents)]
    write_ids(target, registry, new)
    before, after = (sum(len(x.ids) for x in entries) for entries in (documents, new))
    return DataReport(len(new), before, after, tuple(translate.relaid), translate.dropped)


def migrate_dataset(source: str | Path, target: str | Path, registry: VocabularyRegistry) -> DataReport:
    """Write the documents of a token dataset in another vocabulary, without encoding anything again.

    What was written is read back and compared with its source before it takes its place: mapped back it gives the
    original, or where a codebook layout changed, equal codes span by span. Its shards are about as large as before.

    Args:
        source: a dataset directory. Its sums are verified first.
        target: where the new one goes; may be ``source``.
        registry: the new vocabulary.

    Raises:
        DataError: the source is damaged, or the target is something other than a dataset.
        VocabularyError: an id without counterpart; its document and position are named. Nothing is written.
    """
    check_target(target)
    data = TokenDataset.open(source)
    data.verify()
    translate, grammar = Translation(data.registry, registry), Grammar(registry)

    def documents() -> Iterator[Record]:
        for number, ids in enumerate(data):
            new = translate(ids, f"{source}: document {number}")
            spans = data.spans(number)
            if len(spans):  # the same segments, in the same order: what is known of each stays
                spans = np.concatenate([find_spans(grammar, new)[:, :3], spans[:, 3:]], 1)
            shard, at = data.locate(number)
            yield Record(new, spans, shard.meta(at), shard.key(at))

    with atomic_directory(target) as work:
        # Of several shards the largest is as large as they were meant to be, or a document less.
        sizes = [x.tokens for x in data.shards]
        largest = max(sizes if len(sizes) > 1 else (SHARD_TOKENS, *sizes))
        write_dataset(work, registry, documents(), largest, data.settings, data.quarantined())
        written = TokenDataset.open(work, registry)
        written.verify()
        for number, (ids, new) in enumerate(zip(data, written, strict=True)):
            translate.check(ids, new, f"{source}: document {number}")
    return DataReport(len(written), data.tokens, written.tokens, tuple(translate.relaid), translate.dropped)


@dataclass(frozen=True)
class LogitProof:
    """That a migrated transformer gives the old one's scores, on random valid sequences of the old vocabulary.

    Attributes:
        sequences, tokens: how much was compared.
        columns: ids with a counterpart, whose scores were compared.
        largest_difference: of two such scores.
        largest_logit: in absolute value, of the old transformer.
        dropped: ids of the old vocabulary without counterpart, in words.
    """

    sequences: int
    tokens: int
    columns: int
    largest_difference: float
    largest_logit: float
    dropped: tuple[str, ...]


def migrate_transformer(
    model: Transformer | str | Path, registry: VocabularyRegistry
) -> tuple[Transformer, LogitProof]:
    """The same transformer over another vocabulary.

    Rows of the embedding, and of the output projection where that is another matrix, move with their ids. A new id
    begins as the mean of the old rows of its modality (control and size tokens count as one each), or of all used rows
    where the modality is new. With that its score is the mean of theirs, so by Jensen's inequality it is sampled no
    more often than they are on average, and the old model's distribution over the old ids hardly moves; random or zero
    rows have no such bound (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"). For the
    same reason the rows of ids that no block uses are not zeros: they are the mean of the old rows of that kind, which
    training has made unlikely, or of all used rows where there were none.

    Args:
        model: a transformer with a registry, its directory, or the name of a bundled one. It is left as it is.
        registry: the new vocabulary.

    Returns:
        A transformer in eval mode on the device of the old one, and the proof by :func:`prove_same`.

    Raises:
        VocabularyError: the transformer has no registry, or the codebooks of one of its tokenizers are laid out in
            another way in the new vocabulary.
        CheckpointError: it cannot be loaded, or the scores differ.
    """
    old = model if isinstance(model, Transformer) else Transformer.load(model)
    if old.registry is None:
        raise VocabularyError("the transformer has no registry; load it from its directory, or set model.registry")
    translation = Translation(old.registry, registry)
    for name, there in translation.relaid.items():
        mine, theirs = (_order(r.tokenizer(n)) for r, n in ((old.registry, name), (registry, there)))
        raise VocabularyError(
            f"tokenizer {name!r} has {mine[1]} codebooks {mine[0]}, in the new vocabulary {theirs[1]} codebooks "
            f"{theirs[0]}: the transformer learned the first order. Give the new vocabulary that layout, or train anew"
        )
    new = (
        Transformer(dataclasses.replace(old.config, vocab_size=registry.padded_size)).to(old.head_weight.device).eval()
    )
    state = old.state_dict()
    new.load_state_dict({k: _rows(v, translation) if k in TABLES else v for k, v in state.items()})
    new.registry = registry
    return new, prove_same(old, new, translation)


@torch.no_grad()
def prove_same(
    old: Transformer,
    new: Transformer,
    translation: Translation,
    *,
    sequences: int = 8,
    length: int = 128,
    seed: int = 0,
) -> LogitProof:
    """Compare the scores of two transformers on random valid sequences of the old vocabulary.

    Args:
        old, new: on one device, in float32.
        translation: from the vocabulary of ``old`` to that of ``new``.
        sequences, length: how many, and how long at most.
        seed: equal seeds give equal sequences.

    Raises:
        CheckpointError: a score differs by more than 1e-5, or where scores are larger than 1, 1e-5 of the largest.
    """
    ids = sample_sequences(translation, sequences, min(length, old.config.max_position_embeddings), seed)
    table = torch.from_numpy(translation.table).to(old.head_weight.device)
    kept = torch.nonzero(table >= 0)[:, 0]
    difference = largest = 0.0
    for row in ids.to(table.device):  # one at a time: the scores of a large vocabulary are large
        expected = old(row[None])[..., kept]
        unlike = (new(table[row][None])[..., table[kept]] - expected).abs().max()
        difference, largest = max(difference, float(unlike)), max(largest, float(expected.abs().max()))
        if not math.isfinite(float(unlike)):
            difference = math.inf
    if not difference <= TOLERANCE * max(1.0, largest):
        raise CheckpointError(
            f"the migrated transformer gives other scores: they differ by up to {difference:.3g} where scores reach "
            f"{largest:.3g}; is it the old one with other rows alone?"
        )
    tokens = int((ids != translation.old.pad).sum())
    return LogitProof(sequences, tokens, len(kept), difference, largest, translation.dropped)


def sample_sequences(translation: Translation, count: int, length: int, seed: int) -> Tensor:
    """Random valid documents of the old vocabulary that the new one has too: int64 [count, length], padded.

    Every block that the grammar allows next is equally likely, and every id within it: so segments are opened often,
    however many text ids there are. A document goes on until the length forces it to end.
    """
    registry = translation.old
    grammar, random = Grammar(registry), torch.Generator().manual_seed(seed)
    block = torch.zeros(registry.padded_size, dtype=torch.int64)
    for i, b in enumerate(registry.blocks):
        block[b.start : b.start + b.capacity] = i
    known = torch.zeros(registry.padded_size, dtype=torch.bool)
    known[: registry.size] = torch.from_numpy(translation.table >= 0)
    state, columns = grammar.initial(count), []
    for step in range(length):
        allowed = grammar.mask(state, torch.full((count,), length - step)) & known
        allowed[:, registry.eos] &= allowed.sum(1) == 1
        sizes = torch.zeros(count, len(registry.blocks)).index_add_(1, block, allowed.float())
        columns.append(torch.multinomial(allowed / sizes[:, block].clamp(min=1), 1, generator=random)[:, 0])
        state = grammar.advance(state, columns[-1])
    return torch.stack(columns, 1)


def _modalities(registry: VocabularyRegistry) -> list[str]:
    """The modality of each row, empty for those that no block uses."""
    out = [""] * registry.padded_size
    for b in registry.blocks:
        out[b.start : b.end] = [b.modality] * b.size
    return out


def _equal(a: Any, b: Any) -> bool:
    """Whether codes are equal, be they an array or one for each level."""
    if isinstance(a, tuple):
        return isinstance(b, tuple) and all(map(np.array_equal, a, b))
    return np.array_equal(a, b)


def _order(spec: TokenizerSpec) -> tuple[str, int]:
    """What a sequence's order of codes depends on."""
    return spec.layout, len(spec.codebook_sizes)


def _rows(weight: Tensor, translation: Translation) -> Tensor:
    """float [old V, C] -> float [new V, C], see :func:`migrate_transformer`."""
    wide = weight.double()
    old, new = (_modalities(registry) for registry in (translation.old, translation.new))
    everything = wide[[bool(m) for m in old]].mean(0)
    out = everything.repeat(len(new), 1)
    for modality in set(old) & set(new):
        out[[m == modality for m in new]] = wide[[m == modality for m in old]].mean(0)
    out = out.to(weight.dtype)
    kept = np.flatnonzero(translation.table >= 0)
    out[translation.table[kept]] = weight[torch.from_numpy(kept)]
    return out
