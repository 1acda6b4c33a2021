"""Rows of equal length from documents of any length.

``best_fit`` -- which row each document goes to, none of them cut
``places``   -- the document and the position at each place of a batch, from where its pieces end
``Packs``    -- a token dataset as rows of ``length`` ids: the plan of them, and a torch ``Dataset``

``whole``: a document is in one row, except that one longer than a row is cut into pieces of ``length``; best fit,
longest first, among ``WINDOW`` consecutive documents (Ding et al. 2024, "Fewer Truncations Improve Language Modeling",
arXiv:2404.10830). What is left of a row is padding. ``stream``: documents end to end, cut every ``length`` ids; only
the last row has padding.

Every piece is a context of its own: positions begin at 0 in it, also where it goes on with a document that was cut, and
it sees no other piece. The plan lies in a temporary file (32 bytes a piece), not in memory.
"""

from __future__ import annotations

import bisect
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmtok.datasets.shardfile import Shard
from mmtok.datasets.shards import TokenDataset
from mmtok.errors import ConfigError, DataError

Packing = Literal["whole", "stream"]
LENGTH = 2048
WINDOW = 65_536  # documents that are packed together, unless they fill as many rows before
PADDING = -1  # the document of a piece that is padding


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """Put each item, the largest first, into the fullest row that has room for it, or else into a new one.

    Rows with equal room, and items of equal size, are taken together, so that the time depends on how many different
    sizes there are.

    Args:
        sizes: int64 [n], 1..length.
        length: room of an empty row.

    Returns:
        int64 [n]: the row of each item; rows are numbered from 0.
    """
    rows = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    values, firsts = np.unique(-sizes[order], return_index=True)
    rooms: dict[int, list[np.ndarray]] = {}  # room -> rows that have it
    there = 0  # bit r is set if there are rows with room r
    used = 0

    def keep(some: np.ndarray, room: int) -> None:
        nonlocal there
        if len(some) and room:
            rooms.setdefault(room, []).append(some)
            there |= 1 << room

    bounds = [*firsts.tolist(), len(order)]
    for size, begin, end in zip((-values).tolist(), bounds, bounds[1:], strict=False):
        items = order[begin:end]
        while len(items):
            fitting = there >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                some = rooms[room].pop()
                if not rooms[room]:
                    there ^= 1 << room
            else:
                room = length
                some = np.arange(used, used - (-len(items) // (room // size)))
                used += len(some)
            each = room // size
            needed = -(-len(items) // each)
            keep(some[needed:], room)
            some = some[:needed]
            placed = min(len(items), needed * each, len(some) * each)
            rows[items[:placed]] = np.repeat(some, each)[:placed]
            full, rest = divmod(placed, each)
            keep(some[:full], room - each * size)
            keep(some[full:], room - rest * size)
            items = items[placed:]
    return rows


def places(bounds: np.ndarray, source: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """What ``mmtok.transformer.packing.pack`` gives beside the ids, of a batch of rows.

    Args:
        bounds: integers [S + 1]: where the S pieces of the batch begin and end in it, all rows end to end, padding
            included: from 0 to N * length.
        source: int64 [S, 3]: (dataset, document, offset) of each piece, document -1 for padding.
        length: of a row.

    Returns:
        int64 [N, length] each: the number of the piece within its row, -1 for padding; the position within the piece,
        0 for padding.
    """
    starts, sizes = bounds[:-1].astype(np.int32) % length, np.diff(bounds)
    first = np.flatnonzero(starts == 0)
    number = np.arange(len(starts))
    number -= np.repeat(first, np.diff(first, append=len(starts)))
    padding = np.flatnonzero(source[:, 1] == PADDING)
    number[padding] = PADDING
    document = np.repeat(number, sizes).reshape(-1, length)
    positions = np.repeat(starts, sizes).reshape(-1, length)  # half as wide as what is given: it stays in the cache
    np.subtract(np.arange(length, dtype=np.int32), positions, out=positions)
    flat = positions.reshape(-1)
    for begin, end in zip(bounds[padding].tolist(), bounds[padding + 1].tolist(), strict=True):
        flat[begin:end] = 0
    return document, positions.astype(np.int64)


class Packs(Dataset):
    """A token dataset as rows of ``length`` ids: ``len(p)``, ``p[i]``; in the order of the documents.

    ``p[i]`` is a dict of int64 [length]: ``ids``; ``document``, the number of the piece within the row, -1 for
    padding; ``positions`` within the piece. ``mmtok.datasets.loader`` gives whole batches, much faster.

    Args:
        dataset: at least one document.
        length: ids in a row.
        packing: ``whole`` or ``stream``.

    Attributes:
        padding: share of padding among all places, 0..1.
        pieces: int64 [P, 4], memory-mapped: document, -1 for padding; where the piece begins among all tokens of the
            dataset, and in its document; ids.
        first: int64 [rows + 1], memory-mapped: the number of each row's first piece.
        starts: int64 [shards]: where each shard begins among all tokens.

    Raises:
        ConfigError: ``length`` is below 1, or another packing.
        DataError: the dataset has no document, is damaged or was changed, or there is no room for the temporary file.
    """

    def __init__(self, dataset: TokenDataset, length: int = LENGTH, packing: Packing = "whole") -> None:
        if length < 1:
            raise ConfigError(f"length is {length}, expected at least 1 id in a row")
        if packing not in get_args(Packing):
            raise ConfigError(f"packing is {packing!r}, expected one of {', '.join(get_args(Packing))}")
        if not len(dataset):
            raise DataError(f"{dataset.path} has no document, expected one at least; see its quarantine for why")
        dataset.check_unchanged()
        self.dataset, self.length, self.packing = dataset, length, packing
        plan = _whole(dataset.shards, length) if packing == "whole" else _stream(dataset.shards, length)
        self.pieces, self.first = _spooled(plan)
        self.starts = np.cumsum([0, *(shard.tokens for shard in dataset.shards[:-1])])
        self._starts, self._positions = self.starts.tolist(), np.arange(length)
        self.padding = 1 - dataset.tokens / (len(self) * length)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.dataset, self.dataset.fingerprint, self.length, self.packing)

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row.

        Raises:
            IndexError: no such row.
            DataError: its part of the dataset is damaged.
        """
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(f"row {index}, expected one of {len(self)}")
        ids, document, positions = (np.empty(self.length, np.int64) for _ in range(3))
        end = 0
        for number, (source, start, _, size) in enumerate(self.pieces[self.first[i] : self.first[i + 1]].tolist()):
            here = slice(end, end := end + size)
            if source == PADDING:
                ids[here], document[here], positions[here] = self.dataset.registry.pad, PADDING, 0
            else:
                shard = bisect.bisect_right(self._starts, start) - 1
                start -= self._starts[shard]
                self.dataset.shards[shard].copy(start, start + size, ids[here])
                document[here], positions[here] = number, self._positions[:size]
        row = {"ids": ids, "document": document, "positions": positions}
        return {k: torch.from_numpy(v) for k, v in row.items()}


def _again(dataset: TokenDataset, fingerprint: str, length: int, packing: Packing) -> Packs:
    """Packs in another process."""
    if dataset.fingerprint != fingerprint:
        raise DataError(f"{dataset.path} was built anew while it was read; begin again with the new dataset")
    return Packs(dataset, length, packing)


def _windows(shards: Sequence[Shard], length: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first document, where it and the following ones begin and the last ends among all tokens: int64 [n + 1])."""
    first = before = 0
    bounds = np.zeros(1, np.int64)
    for shard in shards:
        ends = shard.ends
        for i in range(0, len(ends), WINDOW):
            bounds = np.concatenate([bounds, before + ends[i : i + WINDOW]])
            while len(bounds) - 1 > (n := _fitting(bounds, length)) or n == WINDOW:
                yield first, bounds[: n + 1]
                first, bounds = first + n, bounds[n:]
        before += shard.tokens
    if len(bounds) > 1:
        yield first, bounds


def _fitting(bounds: np.ndarray, length: int) -> int:
    """How many of these documents make a window: at least one, also if it is larger than a window."""
    within = int(np.searchsorted(bounds, bounds[0] + WINDOW * length, side="right")) - 1
    return min(WINDOW, len(bounds) - 1, max(1, within))


def _whole(shards: Sequence[Shard], length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each window its pieces, int64 [p, 4], and which of them begin a row."""
    for number, bounds in _windows(shards, length):
        sizes = np.diff(bounds)
        documents = np.arange(len(sizes))
        full, rest = np.divmod(sizes, length)
        short = np.flatnonzero(rest)
        rows = best_fit(rest[short], length)
        count = int(rows.max()) + 1 if len(rows) else 0
        room = length - np.bincount(rows, rest[short], count).astype(np.int64)
        padded = np.flatnonzero(room)
        cut = np.repeat(documents, full)
        part = np.arange(len(cut)) - np.repeat(np.cumsum(full) - full, full)
        row = np.concatenate([rows, count + np.arange(len(cut)), padded])
        document = np.concatenate([short, cut, np.full(len(padded), len(sizes))])
        offset = np.concatenate([full[short] * length, part * length, np.zeros(len(padded), np.int64)])
        size = np.concatenate([rest[short], np.full(len(cut), length), room[padded]])
        # rows in the order of their first pieces, pieces in that of the documents, padding last
        order = np.lexsort((offset, document))
        begins = np.empty(count + len(cut), np.int64)
        begins[row[order[::-1]]] = np.arange(len(order))[::-1]
        order = order[np.argsort(begins[row[order]], kind="stable")]
        pieces = np.stack([number + document, bounds[document] + offset, offset, size], 1)[order]
        pieces[document[order] == len(sizes), :2] = PADDING, 0
        yield pieces, np.diff(row[order], prepend=-1) != 0


def _stream(shards: Sequence[Shard], length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As ``_whole``."""
    end = 0
    for number, bounds in _windows(shards, length):
        begin, end = int(bounds[0]), int(bounds[-1])
        cuts = np.union1d(bounds, np.arange(begin - begin % length, end, length)[begin % length > 0 :])
        start = cuts[:-1]
        document = np.searchsorted(bounds, start, side="right") - 1
        pieces = np.stack([number + document, start, start - bounds[document], np.diff(cuts)], 1)
        yield pieces, start % length == 0
    if end % length:
        yield np.array([[PADDING, 0, 0, length - end % length]]), np.zeros(1, bool)


def _spooled(plan: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of all windows, and the number of each row's first one and of the pieces, in files without a name."""
    total = 0
    try:
        with tempfile.TemporaryFile() as pieces, tempfile.TemporaryFile() as first:
            for some, begins in plan:
                pieces.write(np.ascontiguousarray(some, "=i8").data)
                first.write((total + np.flatnonzero(begins)).astype("=i8").data)
                total += len(some)
            first.write(np.array([total], "=i8").data)
            return _mapped(pieces).reshape(-1, 4), _mapped(first)
    except OSError as error:
        raise DataError(
            f"{tempfile.gettempdir()}: the plan of the rows cannot be written ({error.strerror}); "
            f"make room (32 bytes for each document and row), or set TMPDIR to another folder"
        ) from error


def _mapped(file: IO[bytes]) -> np.ndarray:
    file.flush()
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), "=i8")
