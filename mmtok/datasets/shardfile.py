"""One shard: many documents in one safetensors file, mapped into memory and checked block by block.

``write_shard`` -- parts -> a file, atomically
``Shard``       -- that file, read at random

    documents  int64 [D, 3]       where the tokens, the spans and the meta of each document end
    spans      int32 [S, 6]       SPAN_COLUMNS
    tokens     uint16|uint32 [T]  the ids of whole documents one after another
    meta       uint8 [M]          a line of JSON for each document, then padding
    keys       uint8 [D, 16]      what each document was made from, see ``mmtok.datasets.build.encode``
    sums       uint64 [B]         XXH3-64 (https://xxhash.com) of each 64 KiB of the file, up to the sums themselves

Any safetensors library reads it. Ids in a file have no redundancy, a flipped bit would be another id: so a block is
compared with its sum when it is first touched, and the sums with that in dataset.json when the shard is opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mmtok.datasets.records import Part
from mmtok.errors import DataError

BLOCK = 1 << 16  # bytes that share a sum: small enough for a random read, large enough for the sum's full speed
_SHIFT = 16
_DTYPES = {"I64": "<i8", "I32": "<i4", "U16": "<u2", "U32": "<u4", "U8": "u1", "U64": "<u8"}
_NAMES = {np.dtype(v): k for k, v in _DTYPES.items()}
_TENSORS = ("documents", "spans", "tokens", "meta", "keys", "sums")


def write_shard(folder: Path, stem: str, parts: Sequence[Part], dtype: np.dtype, registry: str) -> dict[str, Any]:
    """Write a shard to ``folder``; it appears under its name when it is complete.

    Args:
        folder: an existing directory.
        stem: the name begins so; eight hex digits of the file's sha256 and .safetensors follow.
        parts: what is in it, in order, at least one; each is taken several times, and no two are held at once.
        dtype: of the tokens.
        registry: fingerprint of the vocabulary.

    Returns:
        Its entry in dataset.json: file, documents, tokens, bytes, sha256, sums (XXH3-64 of the sums, hex).
    """
    rows, spans, tokens, meta = np.sum([[len(array) for array in x[:4]] for x in parts], axis=0).tolist()
    padding = -(tokens * dtype.itemsize + meta) % 8  # so that the sums lie at a multiple of 8
    shapes: dict[str, tuple[np.dtype, list[int]]] = {
        "documents": (np.dtype("<i8"), [rows, 3]),
        "spans": (np.dtype("<i4"), [spans, 6]),
        "tokens": (dtype, [tokens]),
        "meta": (np.dtype("u1"), [meta + padding]),
        "keys": (np.dtype("u1"), [rows, 16]),
    }
    header: dict[str, Any] = {"__metadata__": {"format": "mmtok token shard 2", "registry": registry}}
    end = 0
    for name, (kind, shape) in shapes.items():
        begin, end = end, end + kind.itemsize * int(np.prod(shape))
        header[name] = {"dtype": _NAMES[kind], "shape": shape, "data_offsets": [begin, end]}
    # The header's own length depends on the number of blocks, which depends on it: a fixed width settles that.
    room = len(json.dumps(header)) + 200
    room += -room % 8
    blocks = -(-(8 + room + end) // BLOCK)
    header["sums"] = {"dtype": "U64", "shape": [blocks], "data_offsets": [end, end + 8 * blocks]}
    head = room.to_bytes(8, "little") + json.dumps(header, separators=(",", ":")).encode().ljust(room)

    def pieces() -> Iterator[bytes | memoryview]:
        yield head
        before = np.zeros(3, "<i8")
        for x in parts:
            yield (x.documents + before).astype("<i8").data.cast("B") if len(x.documents) else b""
            before = before + (x.documents[-1] if len(x.documents) else 0)
        for i in (1, 2, 3):
            for x in parts:
                yield np.ascontiguousarray(x[i]).data.cast("B") if x[i].size else b""
        yield b"\n" * padding
        for x in parts:
            yield np.ascontiguousarray(x.keys).data.cast("B") if x.keys.size else b""

    temporary = folder / f".{stem}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            digest, sums = hashlib.sha256(), _Sums()
            for piece in pieces():
                file.write(piece)
                digest.update(piece)
                sums.update(piece)
            tail = np.array(sums.finish(), "<u8").tobytes()
            file.write(tail)
            digest.update(tail)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        name = f"{stem}.{digest.hexdigest()[:8]}.safetensors"
        os.replace(temporary, folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return {
        "file": name,
        "documents": rows,
        "tokens": tokens,
        "bytes": size,
        "sha256": digest.hexdigest(),
        "sums": xxhash.xxh3_64_hexdigest(tail),
    }


class Shard:
    """A shard file, mapped into memory.

    Args:
        file: what ``write_shard`` wrote.
        entry: what it returned.
        dtype: of the tokens.
        registry: fingerprint of the vocabulary.
        check: compare each block with its sum when it is first touched.

    Attributes:
        file: its path.
        documents, tokens: how many.

    Raises:
        DataError: the file is missing, of another size, of another format or vocabulary, or its sums are damaged.
    """

    def __init__(self, file: Path, entry: dict[str, Any], dtype: np.dtype, registry: str, check: bool = True) -> None:
        self.file, self.documents, self.tokens = file, int(entry["documents"]), int(entry["tokens"])
        try:
            self._map = _mapped(file, entry["bytes"])
        except OSError as error:
            if error.errno == errno.EMFILE:
                advice = "each shard is an open file: allow more with ulimit -n, or build with a larger --shard-tokens"
            else:
                advice = "fetch or build the dataset again"
            raise DataError(f"{file}: {error.strerror}; {advice}") from error
        self._bytes = np.frombuffer(self._map, np.uint8)
        views = self._read_header(registry)
        self._at = {name: offset for name, (offset, _) in views.items()}
        wrong = [
            f"{name} {self_dtype.name} {list(shape)}"
            for name, self_dtype, shape in (
                ("documents", np.dtype("<i8"), (self.documents, 3)),
                ("tokens", dtype, (self.tokens,)),
                ("keys", np.dtype("u1"), (self.documents, 16)),
            )
            if (views[name][1].dtype, views[name][1].shape) != (self_dtype, shape)
        ]
        if wrong:
            raise DataError(f"{file}: expected {', '.join(wrong)}; fetch or build the dataset again")
        self._documents, self._spans, self._tokens, self._meta, self._keys, self._sums = (
            views[name][1] for name in _TENSORS
        )
        self._itemsize, self._tokens_at = dtype.itemsize, self._at["tokens"]
        self._covered = self._at["sums"]
        if xxhash.xxh3_64_hexdigest(self._sums.data) != entry["sums"] or len(self._sums) != -(-self._covered // BLOCK):
            raise self._damaged("its table of sums")
        self._seen = bytearray(len(self._sums)) if check else bytearray(b"\1" * len(self._sums))
        self._touch(0, 1)  # the header

    @property
    def ends(self) -> np.ndarray:
        """Where each document ends, int64 [documents], memory-mapped."""
        self._touch_rows("documents", self._documents)
        return self._documents[:, 0]

    def bounds(self, document: int) -> tuple[int, int]:
        """Where a document's tokens begin and end in the shard."""
        return self._range(document, 0)

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Ids start..stop of the shard, as they are stored: uint16 or uint32, read-only.

        Raises:
            IndexError: outside the shard.
            DataError: a block of the file is damaged.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"{self.file}: tokens {start} to {stop}, expected 0 to {self.tokens}")
        if start < stop:
            at = self._tokens_at
            self._touch(at + start * self._itemsize, at + stop * self._itemsize)
        return self._tokens[start:stop]

    def copy(self, start: int, stop: int, out: np.ndarray) -> None:
        """Ids start..stop of the shard into ``out``, integers [stop - start]; raises as ``ids``."""
        out[...] = self.ids(start, stop)

    @property
    def raw(self) -> memoryview:
        """All ids as bytes, as they are stored: not checked, for who has read the same with ``ids`` before."""
        return self._tokens.data.cast("B")

    def check_size(self) -> None:
        """Whether the file still has its size: to read what was cut off would end the process.

        Raises:
            DataError: it has not.
        """
        if (size := self._map.size()) != len(self._bytes):
            raise DataError(
                f"{self.file} was changed while it was read: it has {size} bytes, expected {len(self._bytes)}; "
                "fetch or build the dataset again"
            )

    def spans(self, document: int) -> np.ndarray:
        """int32 [s, 6] of a document: ``SPAN_COLUMNS``."""
        first, last = self._range(document, 1)
        at = self._at["spans"]
        self._touch(at + 24 * first, at + 24 * last)
        return self._spans[first:last]

    def meta(self, document: int) -> dict[str, Any]:
        """The meta of a document."""
        first, last = self._range(document, 2)
        at = self._at["meta"]
        self._touch(at + first, at + last)
        return json.loads(self._meta[first:last].tobytes())

    def key(self, document: int) -> bytes:
        """The key of a document, 16 bytes."""
        at = self._at["keys"] + 16 * document
        self._touch(at, at + 16)
        return self._keys[document].tobytes()

    def part(self, first: int = 0, last: int | None = None) -> Part:
        """Documents first..last of the shard, checked; views of the file where that is possible."""
        last = self.documents if last is None else last
        (t0, t1), (s0, s1), (m0, m1) = (
            (self._range(first, i)[0], self._range(last - 1, i)[1]) if last > first else (0, 0) for i in range(3)
        )
        at, size = self._at, self._itemsize
        self._touch(at["tokens"] + size * t0, at["tokens"] + size * t1)
        self._touch(at["spans"] + 24 * s0, at["spans"] + 24 * s1)
        self._touch(at["meta"] + m0, at["meta"] + m1)
        self._touch(at["keys"] + 16 * first, at["keys"] + 16 * last)
        self._touch(at["documents"] + 24 * first, at["documents"] + 24 * last)
        documents = self._documents[first:last] - np.array([t0, s0, m0], "<i8")
        return Part(documents, self._spans[s0:s1], self._tokens[t0:t1], self._meta[m0:m1], self._keys[first:last])

    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """The whole tables of documents, int64 [D, 3], and spans, int32 [S, 6], checked and mapped."""
        self._touch_rows("documents", self._documents)
        self._touch_rows("spans", self._spans)
        return self._documents, self._spans

    def check_all(self) -> None:
        """Compare every block with its sum, touched before or not.

        Raises:
            DataError: the first damaged block.
        """
        self._seen = bytearray(len(self._sums))
        self._touch(0, self._covered)

    def _range(self, document: int, column: int) -> tuple[int, int]:
        if not 0 <= document < self.documents:
            raise IndexError(f"{self.file}: document {document}, expected one of {self.documents}")
        at = self._at["documents"] + 24 * document
        self._touch(max(self._at["documents"], at - 24), at + 24)
        table = self._documents
        return int(table[document - 1, column]) if document else 0, int(table[document, column])

    def _touch_rows(self, name: str, array: np.ndarray) -> None:
        self._touch(self._at[name], self._at[name] + array.nbytes)

    def _touch(self, start: int, stop: int) -> None:
        """Compare the blocks that hold the bytes start..stop with their sums, once each."""
        first, last = start >> _SHIFT, (stop - 1 >> _SHIFT) + 1
        if self._seen.find(0, first, last) < 0:
            return
        for block in range(first, last):
            if self._seen[block]:
                continue
            data = self._bytes[block * BLOCK : min((block + 1) * BLOCK, self._covered)]
            if xxhash.xxh3_64_intdigest(data.data) != self._sums[block]:
                raise self._damaged(f"the block of bytes {block * BLOCK} to {block * BLOCK + len(data) - 1}")
            self._seen[block] = 1

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self.file}: {what} is damaged (another XXH3-64); fetch or build the dataset again")

    def _read_header(self, registry: str) -> dict[str, tuple[int, np.ndarray]]:
        """name -> (offset in the file, the tensor as a view)."""
        data = self._bytes
        try:
            room = int.from_bytes(data[:8].tobytes(), "little")
            if not 2 <= room <= len(data) - 8:
                raise ValueError(f"a header of {room} bytes")
            header = json.loads(data[8 : 8 + room].tobytes())
            about = header["__metadata__"]
            views = {}
            for name in _TENSORS:
                kind, shape = np.dtype(_DTYPES[header[name]["dtype"]]), header[name]["shape"]
                begin, end = header[name]["data_offsets"]
                view = data[8 + room + begin : 8 + room + end].view(kind).reshape(shape)
                views[name] = (8 + room + int(begin), view)
            if about["registry"] != registry:
                raise ValueError(f"the vocabulary {str(about['registry'])[:12]}, expected {registry[:12]}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.file} is no token shard ({reason}); fetch or build the dataset again") from error
        return views


def _mapped(file: Path, expected: int) -> mmap.mmap:
    """A file of so many bytes in memory. A process that has as many files as it may is given as many as it can have."""
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size != expected:
                raise DataError(
                    f"{file} has {size} bytes, expected {expected}; it was cut or belongs to another dataset: fetch or "
                    "build the dataset again"
                )
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return _mapped(file, expected)


class _Sums:
    """XXH3-64 of each block of a stream of bytes."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._hash, self._left = xxhash.xxh3_64(), BLOCK

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            piece, view = view[: self._left], view[self._left :]
            self._hash.update(piece)
            self._left -= len(piece)
            if not self._left:
                self._close()

    def finish(self) -> list[int]:
        if self._left < BLOCK:
            self._close()
        return self._done

    def _close(self) -> None:
        self._done.append(self._hash.intdigest())
        self._hash, self._left = xxhash.xxh3_64(), BLOCK
