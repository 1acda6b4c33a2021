"""Emu3: images of any size, the size written in decimal digits of the text model.

github.com/baaivision/Emu3, ``emu3/mllm/processing_emu3.py`` and ``emu3/train/datasets.py``::

    <|image start|> height '*' width <|image token|> (code{w} EOL){h} EOF <|image end|>

The ids of these are in ``emu3/mllm/configuration_emu3.py``, the codebook of 32768 in
``emu3/tokenizer/configuration_emu3visionvq.py``; it ends the vocabulary of 184622, so code 0 is id 151854. The
tokenizer splits numbers into single digits (``PAT_STR`` in ``emu3/mllm/tokenization_emu3.py``). Their ids are in its
``emu3.tiktoken``, which that repository has not; github.com/NVIDIA/NeMo has a copy in
``nemo/collections/multimodal_autoregressive/tokenizer/``. Emu3's own decoding finds rows by pattern: lost codes and
a size that does not fit go unseen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmtok.adapters.base import Segment
from mmtok.adapters.flat import TEXT, Flat, Reader, Table
from mmtok.arrays import integers
from mmtok.blocks import TokenizerSpec
from mmtok.errors import VocabularyError

SIZE, CODES, FIRST = 184622, 32768, 151854
MAX_DIGITS = 9  # of a height or width


class Emu3(Flat):
    """Emu3: images of any size.

    Args:
        digits: ids of the text model for 0 to 9.
        times: id of the text model for ``*``.

    Raises:
        VocabularyError: these are not eleven different text ids.
    """

    name = "emu3"
    source = "github.com/baaivision/Emu3: emu3/mllm/processing_emu3.py, emu3/mllm/configuration_emu3.py"
    openings = ("image start",)

    def __init__(self, digits: Sequence[int] = tuple(range(15, 25)), times: int = 9) -> None:
        self.table = Table(
            SIZE,
            {
                "image start": 151852,
                "image token": 151851,
                "image code": np.arange(FIRST, FIRST + CODES),
                "row end": 151846,
                "frame end": 151847,
                "image end": 151853,
            },
        )
        marks = integers([*digits, times], "digits and times")
        if marks.shape != (11,) or len(np.unique(marks)) < 11 or marks.min() < 0 or marks.max() >= SIZE:
            raise VocabularyError(f"digits {tuple(digits)} and times {times}, expected eleven different ids")
        if (self.table.kind[marks] != TEXT).any():
            raise VocabularyError(f"digits {tuple(digits)} and times {times}, expected ids of the text model")
        self._digits, self._times = marks[:10].astype(np.int64), int(times)
        self._values = {int(id): value for value, id in enumerate(self._digits)}
        self.specs = (
            TokenizerSpec("text", "text", (SIZE,), "published:emu3/text"),
            TokenizerSpec("image", "image", (CODES,), "published:emu3/visionvq", properties={"downsample": 8}),
        )

    def _side(self, reader: Reader, at: int, end: int, name: str) -> tuple[int, int]:
        """A height or width in decimal, which the id ``end`` ends, and the position behind that."""
        value = i = 0
        while True:
            id = int(reader.raw[at + i]) if at + i < len(reader) else -1
            if i and id == end:
                return value, at + i + 1
            digit = self._values.get(id)
            if i == 0 and not digit:  # a leading zero would not come back
                raise reader.error(at, "a digit from 1 to 9")
            if digit is None or i == MAX_DIGITS:
                raise reader.error(at + i, name if i == MAX_DIGITS else f"a digit or {name}")
            value, i = value * 10 + digit, i + 1

    def _read(self, reader: Reader, at: int, opening: str) -> tuple[Segment, int]:
        h, at = self._side(reader, at, self._times, "'*'")
        w, at = self._side(reader, at, int(self.table.members["image token"][0]), "image token")
        codes, at = reader.rows(at, h, w, "image code", "row end")
        reader.one(at, "frame end")
        reader.one(at + 1, "image end")
        return Segment("image", codes), at + 2

    def _write(self, segment: Segment) -> np.ndarray:
        ids, (h, w) = self.table.members, segment.codes.shape
        height, width = (self._digits[[int(x) for x in str(side)]] for side in (h, w))
        rows = np.column_stack([ids["image code"][segment.codes], np.repeat(ids["row end"], h)]).reshape(-1)
        head = [ids["image start"], height, [self._times], width, ids["image token"]]
        return np.concatenate([*head, rows, ids["frame end"], ids["image end"]])
