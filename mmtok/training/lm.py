"""The loss of the reference transformer: cross-entropy among the ids that the grammar lets compete.

Within a picture only the codes of the level that is due can follow; within a sound these, with what may end a sound at
that level: the closing after whole frames, in a delayed layout the fill, in a codebook-major one the next level (a
level that stands in several slots of a frame has one set of competitors for all of them).
Scoring just those columns is what masked sampling does too, and it saves most of the output projection.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.blocks import Block
from mmtok.grammar import Grammar
from mmtok.layouts import Delayed
from mmtok.transformer.model import Transformer
from mmtok.transformer.packing import attention_mask


class SequenceLoss:
    """Mean cross-entropy over chosen targets of packed sequences.

    Args:
        grammar: of the model's registry.
        text_weight: of text and control targets, of which a batch holds few beside the codes.
    """

    def __init__(self, grammar: Grammar, text_weight: float = 1.0) -> None:
        registry = grammar.registry
        self.text_weight = text_weight
        self.grammar = grammar
        self.names: list[str] = ["text"]
        self.columns: list[Tensor] = [
            torch.cat(
                [
                    torch.arange(b.start, b.start + b.size)
                    for b in registry.blocks
                    if b.modality in ("control", "text", "grid")
                ]
            )
        ]
        self.group = torch.zeros(registry.padded_size, dtype=torch.int64)
        for block in registry.blocks:
            if block.modality not in ("image", "audio"):
                continue
            columns = torch.tensor([*range(block.start, block.end), *_ends(grammar, block)])
            if self.group[columns[0]]:  # came with the level before
                continue
            self.group[columns] = len(self.columns)
            self.names.append(block.name)
            self.columns.append(columns)
        self.place = torch.full((len(self.columns), registry.padded_size), -1, dtype=torch.int64)
        for i, columns in enumerate(self.columns):
            self.place[i, columns] = torch.arange(len(columns))

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
            (weighted mean loss in nats over all chosen targets, mean loss of each group by name).
        """
        read = ids if seen is None else seen
        hidden = model.hidden(read[:, :-1], positions[:, :-1], attention_mask(document[:, :-1]))
        target = ids[:, 1:]
        free = torch.from_numpy(self.grammar.loss_mask(ids)).to(ids.device)[:, 1:]
        wanted = answer[:, 1:] & (document[:, 1:] == document[:, :-1]) & free
        hidden, target = hidden[wanted], target[wanted]
        group = self.group.to(ids.device)[target]
        # without a target: a zero that can still be differentiated
        total = hidden.new_zeros((), dtype=torch.float32) if len(target) else hidden.float().sum()
        parts, weights = {}, 0.0
        for i, (name, columns) in enumerate(zip(self.names, self.columns, strict=True)):
            chosen = group == i
            count = int(chosen.sum())
            if count:
                scores = F.linear(hidden[chosen], model.head_weight[columns.to(ids.device)])
                place = self.place[i].to(ids.device)[target[chosen]]
                loss = F.cross_entropy(scores.float(), place, reduction="sum")
                parts[name] = loss.item() / count
                weight = self.text_weight if i == 0 else 1.0
                total, weights = total + weight * loss, weights + weight * count
        return total / max(1.0, weights), parts


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
