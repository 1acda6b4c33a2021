"""Start a transformer of one vocabulary from a trained one of another: a better tokenizer need not cost a new training.

Ids that both vocabularies have keep their rows of the embedding table. A code of a new tokenizer starts at the mean of
the rows of the old codes that stood in its places, in the same pictures or sounds written with both tokenizers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch

from mmtok.errors import ConfigError, VocabularyError
from mmtok.registry import VocabularyRegistry
from mmtok.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Inheritance:
    """How many ids of the new vocabulary got their rows in which way.

    Attributes:
        kept: they are in the old vocabulary too.
        averaged: from the old ids that stood in their places.
        other: the mean of all old rows: never seen.
    """

    kept: int
    averaged: int
    other: int


@torch.no_grad()
def inherit(
    model: Transformer,
    registry: VocabularyRegistry,
    old: Transformer,
    old_registry: VocabularyRegistry,
    twins: Iterable[tuple[np.ndarray, np.ndarray]],
) -> Inheritance:
    """Give ``model`` the weights of ``old``, and its embedding table the rows that fit its own vocabulary.

    Args:
        model: of ``registry``; the shape of ``old`` but for the size of the vocabulary.
        twins: pairs (ids of ``registry``, ids of ``old_registry``), integers [n] each, of the same segments: what
            stands at one place in one stands for what stands there in the other.

    Raises:
        ConfigError: the models are of different shapes.
        VocabularyError: twins of unequal length.
    """
    if dataclasses.replace(model.config, vocab_size=1) != dataclasses.replace(old.config, vocab_size=1):
        raise ConfigError(f"got a model {old.config}, expected one of the shape {model.config} but for its vocabulary")
    source = old.state_dict()
    table = source["model.embed_tokens.weight"]
    rows = np.full(registry.size, -1)
    moved = registry.remap(old_registry)
    rows[moved[moved >= 0]] = np.flatnonzero(moved >= 0)
    for name, id in registry.controls.items():  # the brackets of a new tokenizer are those of the one before it
        if rows[id] < 0:
            rows[id] = old_registry.controls.get(name, -1)
    kept = torch.from_numpy(rows >= 0)

    total, count = torch.zeros(registry.size, table.shape[1]), torch.zeros(registry.size)
    for new_ids, old_ids in twins:
        if len(new_ids) != len(old_ids):
            raise VocabularyError(
                f"got twins of {len(new_ids)} and {len(old_ids)} ids, expected the same segment in both vocabularies"
            )
        at = torch.from_numpy(np.asarray(new_ids))
        total.index_add_(0, at, table[torch.from_numpy(np.asarray(old_ids))].float())
        count.index_add_(0, at, torch.ones(len(at)))
    averaged = ~kept & (count > 0)

    fresh = table[: old_registry.size].float().mean(0).repeat(registry.size, 1)
    fresh[averaged] = total[averaged] / count[averaged, None]
    fresh[kept] = table[torch.from_numpy(rows[rows >= 0])].float()
    target = model.state_dict()
    for name, weight in target.items():
        if weight.shape[:1] == (model.config.vocab_size,) and weight.shape[1:] == table.shape[1:]:
            weight[: registry.size] = fresh
        else:
            weight.copy_(source[name])
    return Inheritance(int(kept.sum()), int(averaged.sum()), int((~kept & ~averaged).sum()))
