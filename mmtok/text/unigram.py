"""Byte-level Unigram: the likeliest split into pieces, over UTF-8 bytes, so that it too is lossless for every string.

A unigram language model of pieces (https://arxiv.org/abs/1804.10959), trained by ``tokenizers``. All 256 bytes are in
the vocabulary: there is no unknown token, no normalisation and no special token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import ClassVar, Self

from tokenizers import models, pre_tokenizers, trainers

from mmtok.errors import CheckpointError
from mmtok.text.bytelevel import ByteLevelTokenizer, byte_table, check_vocab_size, compact_json

_DIGITS = 6
_UNNEEDED = 256 * 1e-4  # the trainer gives bytes that it did not need the lowest score, and each next one 0.0001 more


class ByteLevelUnigram(ByteLevelTokenizer):
    """A unigram model of pieces; see :class:`ByteLevelTokenizer`."""

    kind: ClassVar[str] = "text-unigram"
    noun: ClassVar[str] = "byte-level Unigram"

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn pieces and their probabilities from texts.

        The trainer adds numbers in an order that changes from run to run, and so ranks the bytes that it did not need.
        Log probabilities are therefore rounded to six digits, and those bytes ranked by their value.

        Args:
            texts: str, in any number; read once.
            vocab_size: 256 bytes and at most ``vocab_size - 256`` longer pieces. Little text gives fewer.

        Raises:
            ConfigError: ``vocab_size`` below 256.
            MediaError: a text that is not str or holds a lone surrogate.
        """
        check_vocab_size(vocab_size)
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size,
            special_tokens=[],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        spec = json.loads(cls._fit(models.Unigram(), trainer, texts))
        scores = {piece: round(score, _DIGITS) for piece, score in spec["model"]["vocab"]}
        lowest = min(scores.values())
        unneeded = [piece for piece in sorted(scores) if len(piece) == 1 and scores[piece] <= lowest + _UNNEEDED]
        scores.update(zip(unneeded, sorted(scores[piece] for piece in unneeded), strict=True))
        spec["model"]["vocab"] = sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))
        return cls(compact_json(spec))

    @classmethod
    def _read(cls, tokenizer_json: str) -> tuple[bytes, ...]:
        try:
            spec = json.loads(tokenizer_json)
            model = spec["model"]
            pieces = [piece for piece, _ in model["vocab"]]
            problems = {
                f"the model is {model['type']!r}": model["type"] != "Unigram",
                "it has an unknown token": model["unk_id"] is not None,
                "it spells unknown characters as bytes": bool(model.get("byte_fallback")),
                "a piece stands there twice": len(set(pieces)) < len(pieces),
                "a score is no finite number": not all(math.isfinite(score) for _, score in model["vocab"]),
            }
            return byte_table(spec, pieces, problems, cls.noun)
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"expected the tokenizer.json of a Unigram model ({error!r})") from error
