"""What all byte-level text tokenizers share: lossless for every Unicode string, and without special tokens.

``TextTokenizer``      -- the base of every text tokenizer: decode, files
``ByteLevelTokenizer`` -- the base of those of a ``tokenizer.json``: encode
``StreamDecoder``      -- text from ids that arrive one by one
``byte_table``         -- the bytes of each id of a ``tokenizer.json``, after checking what all models must have
"""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, filterfalse, pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmtok import checkpoints
from mmtok.documents import check_text
from mmtok.errors import CheckpointError, ConfigError, MediaError, VocabularyError
from mmtok.text.engines import Encoder

FILE = "tokenizer.json"
# GPT-4's, in the spelling of Llama 3's tokenizer.json, which other engines recognise.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# 0xC0, 0xC1 and 0xF5 to 0xFF stand in no UTF-8; GPT-NeoX has no ids for them.
BYTES = frozenset(bytes([byte]) for byte in range(0xF5) if byte not in (0xC0, 0xC1))
_PIECE = 1_000_000
# Every character of one and two bytes, a few longer ones, space in all places: encoding it proves a file lossless.
_PROBE = "  it's " + "".join(map(chr, range(0x800))) + " \n\t  \ufeff\u2581\U0001f600 <|endoftext|> 12345  \r\n "


class TextTokenizer(ABC):
    """What every text tokenizer is, whatever its model. A subclass encodes, and reads its canonical file.

    Immutable; what ``encode`` returns depends on the text alone. ``_prefix`` is what the model puts before each text.
    """

    kind: ClassVar[str]
    modality: ClassVar[str] = "text"
    file: ClassVar[str]
    _id_to_bytes: tuple[bytes, ...]
    _prefix: bytes = b""

    @classmethod
    @abstractmethod
    def _from_file(cls, data: bytes) -> Self:
        """A tokenizer from the bytes of its canonical file."""

    @abstractmethod
    def _files(self) -> dict[str, bytes]:
        """The canonical file by its name."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """(number of ids,)."""
        return (len(self._id_to_bytes),)

    @property
    def properties(self) -> dict[str, Any]:
        """What a registry keeps beside the sizes: nothing for text."""
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config and canonical file: what the ids mean."""
        return checkpoints.fingerprint(self.kind, self._config_json(), self._files())

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64 [n]. Nothing in a text is special.

        Raises:
            MediaError: not a list of str, or a text with a lone surrogate, with its position.
        """

    def decode(self, codes: Sequence[Any]) -> list[str]:
        """The text of each id sequence. Bytes that are not UTF-8, as sampled ids may give, become U+FFFD.

        Raises:
            VocabularyError: not integers, or out of range, with the position.
        """
        return [data.decode("utf-8", errors="replace") for data in self.decode_bytes(codes)]

    def decode_bytes(self, codes: Sequence[Any]) -> list[bytes]:
        """The exact bytes of each id sequence.

        Raises:
            VocabularyError: not integers, or out of range, with the position.
        """
        return [self._joined(ids).removeprefix(self._prefix) for ids in codes]

    def stream(self) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self)

    def save(self, path: str | Path) -> None:
        """Write config.json, the canonical file and mmtok.json to a directory, atomically."""
        checkpoints.save_checkpoint(path, self.kind, self._config_json(), self._files())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a directory that ``save`` wrote.

        Raises:
            CheckpointError: missing, damaged, of another kind, or not a model of the class's sort.
        """
        meta, config_json, files, directory = checkpoints.read_checkpoint(path)
        if meta["kind"] != cls.kind:
            raise CheckpointError(f"{directory} holds a {meta['kind']!r}, expected a {cls.kind!r}")
        if cls.file not in files:
            raise CheckpointError(f"{directory} has no {cls.file}; save or fetch the checkpoint again")
        try:
            model = cls._from_file(files[cls.file])
        except (CheckpointError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{directory / cls.file}: {error}") from error
        if config_json != model._config_json():
            raise CheckpointError(f"{directory}: config.json does not describe its {cls.file}; save it again")
        return model

    def _config_json(self) -> str:
        return json.dumps({"vocab_size": len(self._id_to_bytes)}, indent=2) + "\n"

    def _joined(self, ids: Any) -> bytes:
        table = self._id_to_bytes
        return b"".join([table[i] for i in self._check_ids(ids).tolist()])

    def _check_ids(self, ids: Any) -> np.ndarray:
        array = np.asarray(ids)
        if array.size == 0 and array.ndim <= 1:
            return np.zeros(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise VocabularyError(f"got ids {array.dtype} {list(array.shape)}, expected a sequence of integers [n]")
        size = len(self._id_to_bytes)
        bad = np.flatnonzero((array < 0) | (array >= size))
        if bad.size:
            raise VocabularyError(f"position {bad[0]}: got text id {array[bad[0]]}, expected 0..{size - 1}")
        return array


class ByteLevelTokenizer(TextTokenizer):
    """A text tokenizer over UTF-8 bytes. Immutable; what ``encode`` returns depends on the text alone.

    Args:
        tokenizer_json: the text of a ``tokenizer.json`` with a byte-level model of the class's sort, no normaliser and
            no added tokens.

    Raises:
        CheckpointError: the file is not of that sort; the message says in what.
    """

    file: ClassVar[str] = FILE
    noun: ClassVar[str]

    def __init__(self, tokenizer_json: str) -> None:
        self._json = tokenizer_json
        self._id_to_bytes = self._read(tokenizer_json)
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        if self.decode([self._tokenizer.encode(_PROBE, add_special_tokens=False).ids]) != [_PROBE]:
            raise CheckpointError(f"expected a lossless {self.noun}, but its pre-tokenizer changes or drops text")

    @classmethod
    @abstractmethod
    def _read(cls, tokenizer_json: str) -> tuple[bytes, ...]:
        """The bytes of each id, after all checks of the class."""

    @staticmethod
    def _fit(model: models.Model, trainer: trainers.Trainer, texts: Iterable[str]) -> str:
        """The tokenizer.json of a model of ``tokenizers`` trained on texts, split into words as GPT-4 does."""
        tokenizer = Tokenizer(model)
        split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator((piece for text in _checked(texts) for piece in _pieces(text)), trainer)
        return tokenizer.to_str()

    @property
    def tokenizer_json(self) -> str:
        """The text of its tokenizer.json."""
        return self._json

    @property
    def engine(self) -> str:
        """What encodes: fastokens, gigatoken or tiktoken, the first that is installed and proven to give the very ids
        of ``tokenizers``, else tokenizers. The proof is made once, with the first ``encode``."""
        return self._encoder.name

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._tokenizer, self._json, self._id_to_bytes)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64 [n]. Nothing in a text is special: "<image>" is seven characters.

        A text of more than 1,000,000 characters is encoded in pieces of that length. The arrays of one call share their
        memory, without overlap.

        Raises:
            MediaError: not a list of str, or a text with a lone surrogate, with its position.
        """
        texts = check_texts(texts)
        if not texts:
            return []
        cut = max(map(len, texts)) > _PIECE
        parts = [_pieces(text) for text in texts] if cut else []
        ids, bounds = self._encoder.encode([piece for part in parts for piece in part] if cut else texts)
        if cut:
            bounds = [bounds[i] for i in accumulate(map(len, parts), initial=0)]
        return [ids[a:b] for a, b in pairwise(bounds)]

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self._json,)

    @classmethod
    def _from_file(cls, data: bytes) -> Self:
        return cls(data.decode("utf-8"))

    def _files(self) -> dict[str, bytes]:
        return {FILE: self._json.encode("utf-8")}


class StreamDecoder:
    """Turns ids into text piece by piece and never gives half a character.

    The pieces of ``push`` and the last one of ``finish``, joined, are what ``decode`` gives for all ids at once.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begun = False

    def push(self, ids: Any) -> str:
        """The text that these ids complete; "" while a character is unfinished.

        Args:
            ids: one int, or integers [n].

        Raises:
            VocabularyError: as :meth:`TextTokenizer.decode`.
        """
        data = self._tokenizer._joined(np.atleast_1d(np.asarray(ids)))
        if data and not self._begun:
            data, self._begun = data.removeprefix(self._tokenizer._prefix), True
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD if the last character was never finished, else "". The decoder can be used again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._begun = False
        return rest


def check_vocab_size(vocab_size: int) -> None:
    """Raise ConfigError for a size that has no room for the bytes."""
    if vocab_size < 256:
        raise ConfigError(f"got vocab_size {vocab_size}, expected at least 256 (one id for each byte)")


def compact_json(spec: dict[str, Any]) -> str:
    """A tokenizer.json without spaces and escapes."""
    return json.dumps(spec, ensure_ascii=False, separators=(",", ":"))


def byte_table(spec: dict[str, Any], tokens: Sequence[str], problems: dict[str, bool], noun: str) -> tuple[bytes, ...]:
    """The bytes of each id, after checking that the tokenizer is complete and knows no special token.

    Args:
        spec: the parsed tokenizer.json.
        tokens: the string of each id, in GPT-2's printable stand-ins of bytes.
        problems: what else is wrong -> whether it is so.
        noun: what is expected.

    Raises:
        CheckpointError: it is not, or one of the problems is there.
    """
    problems = {
        **problems,
        "it has added tokens, which text could then produce": bool(spec["added_tokens"]),
        "it has a normaliser, which loses text": spec["normalizer"] is not None,
        "it cuts texts off, or pads them": bool(spec.get("truncation") or spec.get("padding")),
    }
    if any(problems.values()):
        found = "; ".join(text for text, wrong in problems.items() if wrong)
        raise CheckpointError(f"expected a plain {noun}, but {found}")
    to_byte = byte_of_character()
    try:
        table = tuple(bytes(to_byte[c] for c in token) for token in tokens)
    except KeyError as error:
        raise CheckpointError(f"expected a {noun}, but {error} in its vocabulary stands for no byte") from error
    missing = len(BYTES - set(table))
    if missing:
        raise CheckpointError(f"expected a {noun}, but {missing} of the {len(BYTES)} bytes of UTF-8 have no id")
    return table


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins of the 256 bytes: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + n): b for n, b in enumerate(others)}}


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list, each one valid Unicode.

    Raises:
        MediaError: not a list of str, or a text with a lone surrogate, with its position.
    """
    if isinstance(texts, str | bytes):
        raise MediaError(f"got a single {type(texts).__name__}, expected a list of str: encode([text])")
    texts = list(texts)
    try:
        # In C alone: a text of ASCII is known to be one, any other is tried.
        deque(map(str.encode, filterfalse(str.isascii, texts)), maxlen=0)
    except (TypeError, UnicodeEncodeError):
        deque(_checked(texts), maxlen=0)
    return texts


def _checked(texts: Iterable[str]) -> Iterator[str]:
    """The texts, each one valid Unicode."""
    for position, text in enumerate(texts):
        try:
            check_text(text)
        except MediaError as error:
            raise MediaError(f"text {position}: {error}") from error
        yield text


def _pieces(text: str) -> list[str]:
    """The text cut every ``_PIECE`` characters: the regex engine of tokenizers panics on 10 million spaces in a row."""
    return [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)] or [""]
