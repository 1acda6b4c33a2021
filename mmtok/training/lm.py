"""The loss of the reference transformer: cross-entropy among the ids that the grammar lets compete.

Within a picture only the codes of the level that is due can follow; within a sound these, with what may end a sound at
that level: the closing after whole frames, in a delayed layout the fill, in a codebook-major one the next level (a
level that stands in several slots of a frame has one set of competitors for all of them).
Scoring just those columns is what masked sampling does too, and it saves most of the output projection.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.blocks import Block
from mmtok.errors import ConfigError
from mmtok.grammar import Grammar
from mmtok.layouts import Delayed
from mmtok.transformer.model import Transformer
from mmtok.transformer.packing import attention_mask


class SequenceLoss:
    """Mean cross-entropy over chosen targets of packed sequences.

    Attributes:
        names: of the groups of ids that compete with each other: "text" (with the control ids and the sizes of
            pictures), then one for each level of codes, by the name of its block.
        modalities: of each group.
        columns: of each group its ids, int64 [n].
        group: int64 [V], the group of each id as a target.
        place: int64 [V], where in the columns of its group the id stands; -1 where it is in none.
    """

    def __init__(self, grammar: Grammar, weights: Mapping[str, float] | None = None, z_loss: float = 0.0) -> None:
        """Prepare for a vocabulary.

        Args:
            grammar: of the model's registry.
            weights: of the targets of each modality, by name; 1 where none is given. Control ids count as text, but
                for those that end a sound, which compete with its codes.
            z_loss: weight of the squared logarithm of the softmax's denominator, which keeps scores from drifting
                (PaLM, https://arxiv.org/abs/2204.02311, section 5: 1e-4); 0 for none.

        Raises:
            ConfigError: a weight for something that is no modality of this vocabulary, or a negative one.
        """
        registry = grammar.registry
        self.grammar = grammar
        self.z_loss = z_loss
        self.names, self.modalities = ["text"], ["text"]
        texts = [b for b in registry.blocks if b.modality in ("control", "text", "grid")]
        self.columns: list[Tensor] = [torch.cat([torch.arange(b.start, b.start + b.size) for b in texts])]
        self.group = torch.zeros(registry.padded_size, dtype=torch.int64)
        self.place = torch.full_like(self.group, -1)
        self.place[self.columns[0]] = torch.arange(len(self.columns[0]))
        for block in registry.blocks:
            if block.modality not in ("image", "audio"):
                continue
            columns = torch.tensor([*range(block.start, block.end), *_ends(grammar, block)])
            if self.group[columns[0]]:  # came with the level before
                continue
            self.group[columns] = len(self.columns)
            self.place[columns] = torch.arange(len(columns))
            self.names.append(block.name)
            self.modalities.append(block.modality)
            self.columns.append(columns)
        weights = dict(weights or {})
        unknown = sorted(set(weights) - set(self.modalities))
        if unknown:
            known = ", ".join(dict.fromkeys(self.modalities))
            raise ConfigError(f"got a weight for {unknown[0]!r}, expected one for each of {known}")
        if min([*weights.values(), z_loss]) < 0:
            raise ConfigError(f"got weights {weights} and z_loss {z_loss}, expected none below 0")
        self.weights = [weights.get(m, 1.0) for m in self.modalities]

    def __call__(
        self,
        model: Transformer,
        ids: Tensor,
        document: Tensor,
        positions: Tensor,
        answer: Tensor,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of a packed batch.

        Args:
            model: the transformer.
            ids, document, positions: int64 [B, T], as ``packing.pack`` gives them.
            answer: bool [B, T], True for the ids that are to be learnt.
            seen: int64 [B, T], what the model reads in the place of ``ids``; the targets stay ``ids``.

        Returns:
            (weighted mean loss in nats over all chosen targets, with the z-loss; mean cross-entropy of each group that
            has targets, by name).
        """
        hidden, where, target, sizes = self._hidden(model, ids, document, positions, answer, seen)
        total = hidden[:0].float().sum()  # a zero that can be differentiated, also where there is no target
        sums, weights = [], 0.0
        for i, (chosen, place) in enumerate(zip(where.split(sizes), target.split(sizes), strict=True)):
            if sizes[i]:
                nats, scale = self._nats(model, hidden[chosen], place, i)
                sums.append(nats.detach().sum())
                total = total + self.weights[i] * (nats + self.z_loss * scale.square()).sum()
                weights += self.weights[i] * sizes[i]
        present = [i for i, n in enumerate(sizes) if n]
        means = torch.stack(sums).tolist() if sums else []
        return total / (weights or 1.0), {self.names[i]: x / sizes[i] for i, x in zip(present, means, strict=True)}

    @torch.no_grad()
    def nats(
        self,
        model: Transformer,
        ids: Tensor,
        document: Tensor,
        positions: Tensor,
        answer: Tensor,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of every chosen target. Arguments as of a call; no gradients, no weights, no z-loss.

        Returns:
            float32 [n] in nats; int64 [n], which group, see ``names`` and ``modalities``; int64 [n], of which document
            (the numbers in ``document``). By group, within a group in order of place.
        """
        hidden, where, target, sizes = self._hidden(model, ids, document, positions, answer, seen)
        parts = zip(where.split(sizes), target.split(sizes), strict=True)
        found = [self._nats(model, hidden[chosen], place, i)[0] for i, (chosen, place) in enumerate(parts) if sizes[i]]
        group = torch.arange(len(sizes), device=ids.device).repeat_interleave(torch.tensor(sizes, device=ids.device))
        return torch.cat([*found, hidden.new_zeros(0, dtype=torch.float32)]), group, document[:, 1:].flatten()[where]

    def _hidden(
        self,
        model: Transformer,
        ids: Tensor,
        document: Tensor,
        positions: Tensor,
        answer: Tensor,
        seen: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """(hidden states [B * (T - 1), C], which of them predict chosen targets int64 [n], by group, where in the
        columns of their group the targets stand int64 [n], how many each group has).
        """
        # Which targets count is worked out on the host, before the model runs: a GPU then has nothing to wait for.
        there, of, asked = ids.cpu(), document.cpu(), answer.cpu()
        free = torch.from_numpy(self.grammar.loss_mask(there))
        wanted = (asked & free)[:, 1:] & (of[:, 1:] == of[:, :-1])
        where = wanted.flatten().nonzero()[:, 0]
        target = there[:, 1:].flatten()[where]
        group, order = self.group[target].sort(stable=True)
        sizes = torch.bincount(group, minlength=len(self.names)).tolist()
        where, place = (x.to(ids.device, non_blocking=True) for x in (where[order], self.place[target[order]]))
        read = ids if seen is None else seen
        hidden = model.hidden(read[:, :-1], positions[:, :-1], attention_mask(document[:, :-1]))
        return hidden.flatten(0, 1), where, place, sizes

    def _nats(self, model: Transformer, hidden: Tensor, place: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Cross-entropy of targets of one group, and the logarithm of the softmax's denominator: float32 [n] each."""
        columns = self.columns[group] = self.columns[group].to(hidden.device)
        scores = F.linear(hidden, model.head_weight[columns]).float()
        chosen = place[:, None]
        nats = -scores.log_softmax(-1).gather(1, chosen)[:, 0]
        return nats, scores.gather(1, chosen)[:, 0] + nats


def _ends(grammar: Grammar, block: Block) -> list[int]:
    """The ids that compete with a block's codes because they end the sound, or its first level."""
    registry = grammar.registry
    b = next(b for b in grammar.states.brackets.values() if b.tokenizer == block.tokenizer)
    if b.layout is None:
        return []
    if b.closes_by_choice:
        return [b.closing] if block.codebook == b.layout.slot_levels[0] else []
    if isinstance(b.layout, Delayed):
        return [b.layout.fill] if block.codebook == b.deciding else []
    following = registry.blocks_of(b.tokenizer)[1]
    return [b.closing, *range(following.start, following.end)] if block.codebook == 0 else []
