"""Byte-level BPE: lossless for every Unicode string, and without special tokens, so that text is only ever text.

Byte-pair encoding of words (https://arxiv.org/abs/1508.07909) over UTF-8 bytes, as GPT-2 does it, with the split
pattern of GPT-4. Training is that of Hugging Face ``tokenizers``, whose ``tokenizer.json`` is the canonical file and
whose ids are the ones that any engine must give (:mod:`mmtok.text.engines`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import ClassVar, Self

from tokenizers import models, pre_tokenizers, trainers

from mmtok.errors import CheckpointError
from mmtok.text.bytelevel import FILE as FILE
from mmtok.text.bytelevel import ByteLevelTokenizer, byte_table, check_vocab_size, compact_json


class ByteLevelBPE(ByteLevelTokenizer):
    """Byte-pair encoding; see :class:`ByteLevelTokenizer`."""

    kind: ClassVar[str] = "text-bpe"
    noun: ClassVar[str] = "byte-level BPE"

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn merges from texts.

        Args:
            texts: str, in any number; read once.
            vocab_size: 256 bytes and at most ``vocab_size - 256`` merges. Little text gives fewer: see
                :attr:`codebook_sizes`.

        Raises:
            ConfigError: ``vocab_size`` below 256.
            MediaError: a text that is not str or holds a lone surrogate.
        """
        check_vocab_size(vocab_size)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        spec = json.loads(cls._fit(models.BPE(), trainer, texts))
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]  # the file is an eighth shorter
        return cls(compact_json(spec))

    @classmethod
    def _read(cls, tokenizer_json: str) -> tuple[bytes, ...]:
        try:
            spec = json.loads(tokenizer_json)
            model, vocab, merges = spec["model"], spec["model"]["vocab"], spec["model"]["merges"]
            lossy = [k for k in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix") if model[k]]
            pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
            known = all(a in vocab and b in vocab and a + b in vocab for a, b in pairs)
            tokens = sorted(vocab, key=vocab.__getitem__)
            problems = {
                f"the model is {model['type']!r}": model["type"] != "BPE",
                f"the model sets {', '.join(lossy)}": bool(lossy),
                "a merge names a token that is not in the vocabulary": not known,
                f"the ids are not 0..{len(vocab) - 1} without gaps": [vocab[t] for t in tokens] != [*range(len(vocab))],
            }
            return byte_table(spec, tokens, problems, cls.noun)
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"expected the tokenizer.json of a BPE model ({error!r})") from error
