"""What is in a token dataset, in numbers, gathered in one pass whose memory does not grow with it.

``gather``     -- a dataset -> its ``Statistics``
``Statistics`` -- counts by block, tokenizer and modality; how long documents are; sizes of pictures, lengths of sounds
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmtok.datasets.chunks import chunks
from mmtok.datasets.records import Part
from mmtok.datasets.shards import TokenDataset, kind_of
from mmtok.registry import MODALITIES, Block, VocabularyRegistry

CONTEXTS = tuple(2**n for n in range(10, 18))  # lengths that models are trained with
STEPS = 2  # bins in a factor of 2
_BINS = 64 * STEPS
_SHORTEST = 2.0**-6  # seconds: where the bins of sounds begin
_REASONS = 200  # more kinds of reasons than this are counted together


class Sizes:
    """A histogram of numbers in bins whose borders grow by a factor of 2 ** (1 / STEPS), with their sum and extremes.

    Args:
        least: where the first bin begins; what is below is counted in it.

    Attributes:
        counts: int64 [bins]; bin i begins at ``least * 2 ** (i / STEPS)``.
        number, total, smallest, largest: of all numbers; the extremes are 0 as long as there are none.
    """

    def __init__(self, least: float = 1.0) -> None:
        self.least = least
        self.counts = np.zeros(_BINS, np.int64)
        self.number, self.total, self.smallest, self.largest = 0, 0.0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """Count some numbers, real [n]."""
        if not len(values):
            return
        self.counts += np.bincount(bins(values, self.least), minlength=_BINS)
        low, high = float(values.min()), float(values.max())
        self.smallest = min(self.smallest, low) if self.number else low
        self.largest = max(self.largest, high)
        self.number += len(values)
        self.total += float(values.sum())

    @property
    def mean(self) -> float:
        """The mean of the numbers; 0 without any."""
        return self.total / self.number if self.number else 0.0

    def edge(self, index: int) -> float:
        """Where bin ``index`` begins."""
        return self.least * 2 ** (index / STEPS)


def bins(values: np.ndarray, least: float = 1.0) -> np.ndarray:
    """int64 [n]: in which bin of ``Sizes`` numbers fall."""
    # The small addend puts a power of two into the bin that begins with it.
    places = np.floor(np.log2(np.maximum(values, least) / least) * STEPS + 1e-9)
    return np.minimum(places, _BINS - 1).astype(np.int64)


@dataclass
class Statistics:
    """What ``gather`` finds.

    Attributes:
        registry: the vocabulary.
        ids: int64 [padded size]: how often each id occurs.
        lengths: of the documents, in tokens.
        beyond: context length -> (documents that are longer, their tokens behind it).
        spans: int64 [tokenizers]: segments of each.
        span_tokens: int64 [tokenizers]: their tokens, brackets included.
        units: float64 [tokenizers]: bytes of text, pixels, seconds of sound.
        pixels: int64 [bins, bins]: pictures by height and width, in the bins of ``Sizes``.
        sides: of the pictures: heights and widths in pixels.
        seconds: of the sounds.
        kinds: set of modalities, a bit for each of MODALITIES -> documents.
        samples: tokenizer's index -> the number of a document with it, drawn at random.
        reasons: kind of reason -> documents in quarantine.
        examples: kind of reason -> the first of them.
    """

    registry: VocabularyRegistry
    ids: np.ndarray
    spans: np.ndarray
    span_tokens: np.ndarray
    units: np.ndarray
    lengths: Sizes = field(default_factory=Sizes)
    beyond: dict[int, tuple[int, int]] = field(default_factory=lambda: dict.fromkeys(CONTEXTS, (0, 0)))
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((_BINS, _BINS), np.int64))
    sides: tuple[Sizes, Sizes] = field(default_factory=lambda: (Sizes(), Sizes()))
    seconds: Sizes = field(default_factory=lambda: Sizes(_SHORTEST))
    kinds: Counter[int] = field(default_factory=Counter)
    samples: dict[int, int] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, block: Block) -> np.ndarray:
        """int64 [size]: how often each code of a block occurs."""
        return self.ids[block.start : block.end]

    def modalities(self) -> dict[str, int]:
        """Tokens of each modality that occurs; grid sizes, brackets and other control tokens are ``control``."""
        out: Counter[str] = Counter()
        for block in self.registry.blocks:
            out[block.modality if block.modality in MODALITIES else "control"] += int(self.of(block).sum())
        return {name: out[name] for name in (*MODALITIES, "control") if out[name]}


def usage(counts: np.ndarray) -> tuple[float, float]:
    """Share of the codes that occur, 0..1, and perplexity, 1..K (0 of nothing), of counts int64 [K]."""
    share = counts[counts > 0] / max(1, counts.sum())
    return float(len(share) / len(counts)), float(2 ** -(share * np.log2(share)).sum()) if len(share) else 0.0


def gather(dataset: TokenDataset, seed: int = 0, advance: Callable[[int], object] | None = None) -> Statistics:
    """Read a whole dataset once.

    Args:
        dataset: any.
        seed: of the documents that are drawn as samples.
        advance: is told how many more documents are done.

    Raises:
        DataError: a block of a file is damaged.
    """
    count = len(dataset.registry.tokenizers)
    out = Statistics(
        dataset.registry, np.zeros(dataset.registry.padded_size, np.int64), np.zeros(count, np.int64),
        np.zeros(count, np.int64), np.zeros(count),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    number = 0
    for shard in dataset.shards:
        for first, part in chunks(shard):
            out.ids += np.bincount(part.tokens, minlength=len(out.ids))
            _lengths(out, part)
            _spans(out, part, number + first, rng)
            if advance is not None:
                advance(len(part.documents))
        number += shard.documents
    for entry in dataset.quarantined():
        reason = kind_of(str(entry.get("reason")))
        if reason not in out.reasons and len(out.reasons) >= _REASONS:
            reason = "other reasons"
        out.reasons[reason] += 1
        out.examples.setdefault(reason, entry)
    return out


def _lengths(out: Statistics, part: Part) -> None:
    lengths = np.diff(part.documents[:, 0], prepend=0)
    out.lengths.add(lengths)
    for context in CONTEXTS:
        over = lengths[lengths > context] - context
        documents, tokens = out.beyond[context]
        out.beyond[context] = documents + len(over), tokens + int(over.sum())


def _spans(out: Statistics, part: Part, first: int, rng: np.random.Generator) -> None:
    """Take in the spans of documents, of which the first is number ``first``."""
    specs = out.registry.tokenizers
    owner = part.spans[:, 2]
    sizes = part.spans[:, 4:].astype(np.float64)
    document = np.repeat(np.arange(len(part.documents)), np.diff(part.documents[:, 1], prepend=0))
    bits = np.array([1 << MODALITIES.index(x.modality) for x in specs], np.int64)
    kinds = np.zeros(len(part.documents), np.int64)
    np.bitwise_or.at(kinds, document, bits[owner])
    for kind, number in enumerate(np.bincount(kinds).tolist()):
        if number:
            out.kinds[kind] += number
    for i, spec in enumerate(specs):
        mine = owner == i
        if not (added := int(mine.sum())):
            continue
        a, b = sizes[mine].T
        out.spans[i] += added
        out.span_tokens[i] += int((part.spans[mine, 1] - part.spans[mine, 0]).sum())
        known = b > 0
        if spec.modality == "text":
            out.units[i] += a.sum()
        elif spec.modality == "image":
            out.units[i] += (a * b).sum()
            for side, values in zip(out.sides, (a, b), strict=True):
                side.add(values[known])
            np.add.at(out.pixels, (bins(a[known]), bins(b[known])), 1)
        else:
            seconds = a[known] / b[known]
            out.units[i] += seconds.sum()
            out.seconds.add(seconds)
        if rng.random() < added / out.spans[i]:  # each of all spans is the sample with the same probability
            out.samples[i] = first + int(rng.choice(document[mine]))
