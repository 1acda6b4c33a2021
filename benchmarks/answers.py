"""The model under examination, asked in batches, and what its answers are worth by the judges.

Answers   -- asks, and decodes strictly
score     -- of answers, by every judge of the part, beside real data and chance
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from concepts import Concept, Media, Question, modality
from judges import Judge, Judges, Nearest, Recordings
from rich.progress import track
from shares import binomial_p, share, shuffled, token_f1

from mmtok.checkpoints import resolve
from mmtok.documents import Text, Turn
from mmtok.errors import MmtokError
from mmtok.multimodal import MultimodalTokenizer
from mmtok.transformer import Request, Sampling, Transformer, generate
from mmtok.transformer.decoder import Decoder

BATCH = 64
LONGEST = 700  # ids of an answer
ALIKE = 4  # names of like length


class Answer(NamedTuple):
    """What the model answered.

    Attributes:
        ids: int64 [n], with the final <eos>.
        segments: decoded; empty where the document does not decode.
        error: why it does not.
    """

    ids: np.ndarray
    segments: tuple[Media, ...]
    error: str

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of the segments."""
        return tuple(type(s).__name__.lower() for s in self.segments)


class Answers:
    """The model, its weights and cache in bfloat16.

    Attributes:
        weights: sha256 of its weights.
    """

    def __init__(self, name: str) -> None:
        self.mm = MultimodalTokenizer.load(name)
        self.model = Transformer.load(name, self.mm.registry)
        self.weights = hashlib.sha256((resolve(name) / "model.safetensors").read_bytes()).hexdigest()
        self._decoder = Decoder(self.model, torch.bfloat16)
        self._ids: dict[Media, np.ndarray] = {}
        self.copy = cache(self._copy)

    def ids(self, segment: Media) -> np.ndarray:
        """The ids of one segment, int64 [n]."""
        if segment not in self._ids:
            kind = type(segment).__name__.lower()
            self._ids[segment] = self.mm.grammar.segment_ids(kind, self.mm.codes(segment))
        return self._ids[segment]

    def _copy(self, segment: Media) -> Media:
        """What is left of a segment as tokens: the best that an answer can be."""
        registry = self.mm.registry
        (made,) = self.mm.decode(np.array([registry.bos, *self.ids(segment), registry.eos])).segments
        assert not isinstance(made, Turn)
        return made

    def prompt(self, segments: Sequence[Media]) -> np.ndarray:
        """``<bos> <user> segments <assistant>``, int64 [n]."""
        registry = self.mm.registry
        parts = [self.ids(s) for s in segments]
        return np.concatenate([[registry.bos, registry.user], *parts, [registry.assistant]]).astype(np.int64)

    def ask(
        self,
        questions: Sequence[Question],
        sampling: Mapping[str, Sampling],
        seed: int = 0,
        forced: bool = True,
        what: str = "asking",
    ) -> list[Answer]:
        """One answer a question, in order; question i has its own chance, (seed, i).

        Args:
            questions: any.
            sampling: of each modality.
            seed: any.
            forced: the answer is restricted to the modalities asked for; else the model chooses.
            what: for the progress bar.
        """
        prompts = [self.prompt(q.segments) for q in questions]
        # Answers of one kind take as many steps; prompts of one length need no padding.
        order = sorted(range(len(questions)), key=lambda i: (questions[i].modalities, len(prompts[i])))
        out: dict[int, Answer] = {}
        for start in track(range(0, len(order), BATCH), what):
            chosen = order[start : start + BATCH]
            targets = [questions[i].modalities if forced else () for i in chosen]
            requests = [
                Request(prompts[i], target, LONGEST, sample=i) for i, target in zip(chosen, targets, strict=True)
            ]
            for i, made in zip(chosen, generate(self._decoder, self.mm.grammar, requests, sampling, seed), strict=True):
                out[i] = self._decoded(made.ids, made.prompt_length)
        return [out[i] for i in range(len(questions))]

    def _decoded(self, ids: np.ndarray, start: int) -> Answer:
        try:
            segments = self.mm.decode(ids).segments
        except MmtokError as error:
            return Answer(ids[start:], (), str(error))
        turn = max(i for i, s in enumerate(segments) if isinstance(s, Turn))
        return Answer(ids[start:], tuple(s for s in segments[turn + 1 :] if not isinstance(s, Turn)), "")


def score(
    judges: Judges, copy: Callable[[Media], Media], part: str, concepts: Sequence[Concept], made: Sequence[Media]
) -> dict:
    """What answers are worth.

    Args:
        judges: the judges.
        copy: gives a segment as its tokenizer leaves it, on which the same judge is tried.
        part: of the answers: ``image``, ``audio:fr`` ...
        concepts: what was asked about.
        made: the answers, of the part's modality.

    Returns:
        By judge: the share of right answers with its interval; of ``real`` data, for which the true answers stand as
        the tokenizer leaves them; ``chance``, one in the number of candidates, and the exact p-value against it; the
        share when the answers are ``shuffled`` among the questions, and the p-value against that. Where candidates are
        ranked, the mean rank of the right one, from 0 (best) to 1 (worst), and its p-value against shuffled answers; of
        speech also against answers that are only shuffled among ``ALIKE`` names each whose recordings are about as
        long, so that a length that is right explains nothing.
        For text also ``f1``, the mean token F1.
    """
    out: dict = {}
    for judge in judges.of[part]:
        pairs = [(label, c, m) for c, m in zip(concepts, made, strict=True) if (label := judge.label(c)) is not None]
        if not pairs:
            continue
        labels = [label for label, _, _ in pairs]
        ranks = np.stack([judge.ranks(m, labels) for _, _, m in pairs])
        hits = ranks.diagonal() == 0
        candidates = len(set(judge.labels))
        others, p = shuffled((ranks == 0).astype(float))
        figures = {
            **share(hits),
            "real": share([_known(judge, copy, part, c) for _, c, _ in pairs]),
            "chance": round(1 / candidates, 4),
            "p": rounded(binomial_p(int(hits.sum()), len(hits), 1 / candidates)),
            "shuffled": round(others, 4),
            "p_shuffled": rounded(p),
        }
        if isinstance(judge, Nearest):
            figures["mean_rank"] = round(float(ranks.diagonal().mean()) / (candidates - 1), 3)
            figures["p_rank"] = rounded(shuffled(-ranks.astype(float))[1])
        if isinstance(judge, Recordings):
            lengths = [len(judge.features(c.truth(part))) for _, c, _ in pairs]
            alike = np.argsort(np.argsort(lengths, kind="stable")) // ALIKE
            figures["p_rank_of_like_length"] = rounded(shuffled(-ranks.astype(float), alike)[1])
        if modality(part) == "text":
            true = [(m, c.truth(part)) for _, c, m in pairs]
            f1 = [token_f1(a.text, b.text) for a, b in true if isinstance(a, Text) and isinstance(b, Text)]
            figures["f1"] = round(float(np.mean(f1)), 3)
        out[judge.name] = figures
    return out


@cache
def _known(judge: Judge, copy: Callable[[Media], Media], part: str, concept: Concept) -> bool:
    return judge.right(copy(concept.truth(part)), concept)


def rounded(p: float) -> float:
    """Two digits that count."""
    return float(f"{p:.2g}")
