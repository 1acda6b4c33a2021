"""Text tokenizers that others trained and published, from local files, as text tokenizers of mmtok.

Ids of text are those of the original library; ``save`` of the tokenizer writes a checkpoint that ``mmtok.load`` reads.
``SYSTEMS`` names the importers.
"""

from __future__ import annotations

from collections.abc import Callable

from mmtok.text.published.base import Imported as Imported
from mmtok.text.published.huggingface import import_tokenizers as import_tokenizers
from mmtok.text.published.sentencepiece import SentencePieceText as SentencePieceText
from mmtok.text.published.sentencepiece import import_sentencepiece as import_sentencepiece
from mmtok.text.published.tiktoken import ENCODINGS as ENCODINGS
from mmtok.text.published.tiktoken import import_tiktoken as import_tiktoken

SYSTEMS: dict[str, Callable[..., Imported]] = {
    "tokenizers": import_tokenizers,
    "tiktoken": import_tiktoken,
    "sentencepiece": import_sentencepiece,
}
