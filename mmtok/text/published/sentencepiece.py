"""A SentencePiece model (https://arxiv.org/abs/1808.06226), BPE or Unigram, as a text tokenizer that loses nothing.

``SentencePieceText``    -- the tokenizer; its canonical file is the published model
``import_sentencepiece`` -- the importer, which compares its ids with the original's

SentencePiece itself splits the text, but from a copy of the model in memory that does not normalise, and whose control
and user-defined symbols no text can name. So ids are the original's wherever the original gives the text back, and any
other text is given back too: what the model does not know, and U+2581, which it takes for a space, as bytes.
User-defined symbols of white space alone, as Gemma has them, are text and stay text.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from mmtok.errors import CheckpointError
from mmtok.sniffing import one_line
from mmtok.text.bytelevel import TextTokenizer, check_texts
from mmtok.text.published.base import Imported, check_ids, probe_texts, read_file, shown

FILE = "tokenizer.model"
_SPACE = "\u2581"
_BYTES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
_MODELS = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
# What is read or changed of sentencepiece_model.proto: message -> number, name, type and default of its fields.
_SCHEMA = {
    "Piece": ((1, "piece", "BYTES", None), (2, "score", "FLOAT", None), (3, "type", "INT32", "1")),
    "Trainer": (
        (3, "model_type", "INT32", "1"),
        (24, "space_is_suffix", "BOOL", "false"),
        (35, "byte_fallback", "BOOL", "false"),
    ),
    "Normalizer": (
        (1, "name", "BYTES", None),
        (2, "table", "BYTES", None),
        (3, "add_prefix", "BOOL", "true"),
        (4, "remove_spaces", "BOOL", "true"),
        (5, "escape_spaces", "BOOL", "true"),
    ),
    "Model": (
        (1, "pieces", "Piece", None),
        (2, "trainer", "Trainer", None),
        (3, "normalizer", "Normalizer", None),
        (4, "self_test", "BYTES", None),
    ),
}
# Runs in a process of its own: the tables of a damaged model can make the library read where it must not.
_ORIGINAL = """
import json, sys
import sentencepiece
model = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
ids = [(text, model.encode(text)) for text in json.load(sys.stdin)]
json.dump([i if model.decode(i) == text else None for text, i in ids], sys.stdout)
"""


class SentencePieceText(TextTokenizer):
    """A text tokenizer on SentencePiece. Immutable; what ``encode`` returns depends on the text alone.

    If the model puts a space before each text, ``encode`` does so too, and ``decode`` takes one space away again.

    Args:
        model: the bytes of a published ``.model``: BPE or Unigram, with byte fallback.

    Raises:
        CheckpointError: it is no such model, or the packages that read it are not installed.
    """

    kind: ClassVar[str] = "text-sentencepiece"
    file: ClassVar[str] = FILE

    def __init__(self, model: bytes) -> None:
        self._model = model
        proto = _parse(model)
        self._names = _check(proto)
        self._prefix = b" " if proto.normalizer.add_prefix else b""
        self._silent = {i: p.type for i, p in enumerate(proto.pieces) if _is_silent(p.type, self._names[i])}
        self._id_to_bytes = tuple(
            b"\xff" + name.encode() if i in self._silent else _piece_bytes(p.type, name)
            for i, (name, p) in enumerate(zip(self._names, proto.pieces, strict=True))
        )
        of_byte = {self._names[i]: i for i, p in enumerate(proto.pieces) if p.type == _BYTE}
        self._mark = np.array([of_byte[f"<0x{byte:02X}>"] for byte in _SPACE.encode()], np.int64)
        self._notes = _notes(proto.normalizer, self.symbols)
        self._processor = _load(proto, self._silent)
        probe = ["", " ", f" the\n{_SPACE} cow  ", "".join(map(chr, range(0x800))), *self.symbols]
        ids = self.encode(probe)
        if self.decode(ids) != probe or np.isin(np.concatenate(ids), list(self._silent)).any():
            raise CheckpointError("expected a SentencePiece model that covers every text, but its pieces lose some")

    @property
    def symbols(self) -> tuple[str, ...]:
        """The names of the ids that no text gives: unknown, control and user-defined symbols."""
        return tuple(self._names[i] for i in self._silent)

    @property
    def engine(self) -> str:
        """What encodes: sentencepiece."""
        return "sentencepiece"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64 [n]. Nothing in a text is special: "<s>" is three characters.

        Raises:
            MediaError: not a list of str, or a text with a lone surrogate, with its position.
        """
        prefix = self._prefix.decode()
        rows = [(prefix + text if text else "").split(_SPACE) for text in check_texts(texts)]
        parts = iter(self._processor.encode([part for row in rows for part in row]))
        out = []
        for row in rows:
            arrays = [np.array(next(parts), np.int64)]
            for _ in row[1:]:
                arrays += [self._mark, np.array(next(parts), np.int64)]
            out.append(np.concatenate(arrays))
        return out

    @classmethod
    def _from_file(cls, data: bytes) -> Self:
        return cls(data)

    def _files(self) -> dict[str, bytes]:
        return {FILE: self._model}

    def __reduce__(self) -> tuple[type[Self], tuple[bytes]]:
        return type(self), (self._model,)


def import_sentencepiece(path: str | Path) -> Imported:
    """A text tokenizer out of a SentencePiece model.

    Args:
        path: the .model file, or a directory with a tokenizer.model.

    Raises:
        CheckpointError: it is no such file, its model is neither BPE nor Unigram or has no byte fallback, or the
            packages sentencepiece and protobuf are not installed.
    """
    file, data = read_file(path, "a SentencePiece model", FILE)
    try:
        tokenizer = SentencePieceText(data)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    texts = probe_texts(tokenizer)
    defined = [tokenizer._names[i] for i, kind in tokenizer._silent.items() if kind == _USER_DEFINED]
    originals = (
        None if any(symbol in text for symbol in defined) else ids
        for text, ids in zip(texts, _originals(file, texts), strict=True)
    )
    compared = check_ids(tokenizer, texts, originals, str(file), "sentencepiece")
    return Imported(tokenizer, tokenizer._notes, "sentencepiece", compared)


def _parse(data: bytes) -> Any:
    """The parts of a ModelProto that :data:`_SCHEMA` names; the others are kept unread.

    Raises:
        CheckpointError: the bytes are none, or protobuf is not installed.
    """
    proto = _message_class()()
    try:
        proto.ParseFromString(data)
    except _protobuf("message").DecodeError as error:
        raise CheckpointError(f"is damaged or no SentencePiece model ({one_line(error)}); fetch it again") from error
    return proto


@functools.cache
def _message_class() -> Any:
    """The class of a ModelProto, made here: the one that sentencepiece brings fits few versions of protobuf."""
    types = _protobuf("descriptor_pb2").FieldDescriptorProto
    file = _protobuf("descriptor_pb2").FileDescriptorProto(name="mmtok.proto", package="mmtok", syntax="proto2")
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, field, kind, default in fields:
            label = types.LABEL_REPEATED if field in ("pieces", "self_test") else types.LABEL_OPTIONAL
            entry = message.field.add(name=field, number=number, label=label)
            if kind in _SCHEMA:
                entry.type, entry.type_name = types.TYPE_MESSAGE, f".mmtok.{kind}"
            else:
                entry.type = getattr(types, f"TYPE_{kind}")
            if default is not None:
                entry.default_value = default
    pool = _protobuf("descriptor_pool").DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return _protobuf("message_factory").GetMessageClass(pool.FindMessageTypeByName("mmtok.Model"))


def _protobuf(module: str) -> Any:
    return _library(f"google.protobuf.{module}")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(
            "a SentencePiece model needs the packages sentencepiece and protobuf; pip install 'mmtok[sentencepiece]'"
        ) from error


def _check(proto: Any) -> tuple[str, ...]:
    """The names of the pieces, after checking that the model can be used.

    Raises:
        CheckpointError: it cannot; the message says why.
    """
    trainer, normalizer = proto.trainer, proto.normalizer
    try:
        names = tuple(p.piece.decode("utf-8") for p in proto.pieces)
    except UnicodeDecodeError as error:
        raise CheckpointError("is damaged or no SentencePiece model (a piece is not UTF-8); fetch it again") from error
    spelled = sorted(name for name, p in zip(names, proto.pieces, strict=True) if p.type == _BYTE)
    if not all(math.isfinite(p.score) for p in proto.pieces):
        raise CheckpointError("is damaged or no SentencePiece model (a score is no finite number); fetch it again")
    if trainer.model_type not in (1, 2):
        sort = _MODELS.get(trainer.model_type, trainer.model_type)
        raise CheckpointError(f"is a {sort} model of SentencePiece, mmtok reads BPE and Unigram")
    if not trainer.byte_fallback or spelled != sorted(_BYTES):
        raise CheckpointError(
            "has no byte fallback, so it loses every character that it does not know; train it again with "
            "--byte_fallback=true, or train a byte-level tokenizer with recipes/text.py"
        )
    if trainer.space_is_suffix or not normalizer.escape_spaces:
        raise CheckpointError("marks spaces in a way that mmtok does not read, expected U+2581 before each word")
    return names


def _is_silent(kind: int, name: str) -> bool:
    space = name.replace(_SPACE, " ").isspace()
    return kind in (_UNKNOWN, _CONTROL) or (kind == _USER_DEFINED and not space)


def _piece_bytes(kind: int, name: str) -> bytes:
    return _BYTES[name] if kind == _BYTE else name.replace(_SPACE, " ").encode()


def _notes(normalizer: Any, symbols: Sequence[str]) -> tuple[str, ...]:
    notes = [f"{len(symbols)} symbols ({shown(symbols)}) keep their ids, but no text gives them"]
    if normalizer.table or normalizer.remove_spaces:
        how = normalizer.name.decode("utf-8", errors="replace") if normalizer.table else "spaces"
        notes.append(
            f"the original normalises text first ({how}) and mmtok does not, to give every text back: ids are the "
            "original's for text that is in that form already"
        )
    return tuple(notes)


def _load(proto: Any, silent: Iterable[int]) -> Any:
    """SentencePiece with this model, less its losses. No text has a piece with a space: it becomes U+2581 first."""
    library = _library("sentencepiece")
    proto.normalizer.Clear()
    proto.normalizer.name = b"identity"
    proto.normalizer.add_prefix = proto.normalizer.remove_spaces = False
    proto.ClearField("self_test")
    for i in silent:
        entry = proto.pieces[i]
        entry.piece = f" {i}".encode()
        entry.type = _UNKNOWN if entry.type == _UNKNOWN else _CONTROL
    try:
        return library.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"sentencepiece cannot use the model ({one_line(error)}); fetch it again") from error


def _originals(file: Path, texts: Sequence[str]) -> list[list[int] | None]:
    """The ids by the original model of the texts that it gives back.

    Raises:
        CheckpointError: it cannot be used, or breaks the process that uses it.
    """
    command = [sys.executable, "-c", _ORIGINAL, str(file)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split("\n")[-2:]).strip() or f"it ended with {done.returncode}"
        raise CheckpointError(f"{file}: sentencepiece itself cannot use the model ({reason}); fetch it again")
    return list(json.loads(done.stdout))
