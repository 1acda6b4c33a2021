"""Chameleon and Lumina-mGPT: one vocabulary and one image codebook, two ways to lay out an image.

Chameleon (github.com/facebookresearch/chameleon, ``chameleon/inference/vocab.py`` and ``chameleon.py``)::

    <racm3:break> code{1024} <eoss>

Lumina-mGPT (github.com/Alpha-VLLM/Lumina-mGPT, ``lumina_mgpt/data/item_processor.py``; height first)::

    <racm3:break> <reserved{8800+h}> <reserved{8800+w}> (code{2w} <reserved08799>){2h} <eoss>

Image ids are found by name: ``IMGIMG``, the digits of the code spelled A to J, and one more letter. In the published
vocabulary they are code + 4, 4..8195 (``lumina_mgpt/inference_solver.py``), ``<reserved{n}>`` is n + 4 (``8804`` and
``8710`` in the files above and ``convert_chameleon_weights_to_hf.py``), of 65536 ids (``configuration_chameleon.py``).
Neither repository prints the ids of start and end; 8197 and 8196 are in github.com/GAIR-NLP/anole, ``inference.py``.
Chameleon itself pads a short image with its first code, and maps ids to codes by order, not by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from mmtok.adapters.base import Segment
from mmtok.adapters.flat import Flat, Reader, Table, lookup, vocabulary_size
from mmtok.blocks import TokenizerSpec
from mmtok.errors import VocabularyError

SIZE = 65536
SIDE = 32  # codes; a Chameleon image has 512 x 512 pixels
MAX_GRIDS = 64  # of 32 pixels: the longest side at 1024 x 1024 pixels and a ratio of at most 4 (item_processor.py)
START, END, ROW_END = "<racm3:break>", "<eoss>", "<reserved08799>"
GRIDS = tuple(f"<reserved{8800 + n:05d}>" for n in range(1, MAX_GRIDS + 1))
PUBLISHED = {START: 8197, END: 8196, ROW_END: 8803, **{name: 8804 + n for n, name in enumerate(GRIDS, 1)}}


def image_ids(vocabulary: Mapping[str, int]) -> np.ndarray:
    """int64 [codes]: the id of each image code, by the names of the vocabulary.

    Raises:
        VocabularyError: a name that spells no number, or numbers that are not 0, 1, 2...
    """
    found: dict[int, int] = {}
    for name, id in vocabulary.items():
        if not name.startswith("IMGIMG"):
            continue
        spelled = re.fullmatch("IMGIMG([A-J0-9]{1,8})[^A-J0-9]", name)
        if not spelled:
            raise VocabularyError(f"vocabulary: {name!r}, expected IMGIMG, digits spelled A to J, and a last letter")
        found[int(spelled[1].translate(str.maketrans("ABCDEFGHIJ", "0123456789")))] = id
    names = sum(name.startswith("IMGIMG") for name in vocabulary)
    if not found or sorted(found) != list(range(names)):
        raise VocabularyError(f"vocabulary: {names} image names with {len(found)} codes, expected codes 0, 1, 2...")
    return np.array([found[code] for code in range(names)], np.int64)


class Chameleon(Flat):
    """Chameleon: images of 32 x 32 codes, in raster order, between start and end.

    Args:
        vocabulary: name -> id of its text tokenizer (``model.vocab`` of ``text_tokenizer.json``); the published ids
            if left out.

    Raises:
        VocabularyError: not the vocabulary of a Chameleon.
    """

    name = "chameleon"
    source = "github.com/facebookresearch/chameleon: chameleon/inference/vocab.py, chameleon/inference/chameleon.py"
    openings = ("image start",)

    def __init__(self, vocabulary: Mapping[str, int] | None = None) -> None:
        size = SIZE if vocabulary is None else vocabulary_size(vocabulary)
        codes = np.arange(4, 8196) if vocabulary is None else image_ids(vocabulary)
        kinds = {name: lookup(vocabulary or PUBLISHED, literals) for name, literals in self._literals().items()}
        self.table = Table(size, {"image code": codes, **kinds})
        self.specs = (
            TokenizerSpec("text", "text", (size,), f"published:{self.name}/text"),
            TokenizerSpec("image", "image", (len(codes),), "published:chameleon/vqgan", properties={"downsample": 16}),
        )

    def _literals(self) -> dict[str, tuple[str, ...]]:
        return {"image start": (START,), "image end": (END,)}

    def _read(self, reader: Reader, at: int, opening: str) -> tuple[Segment, int]:
        n = SIDE * SIDE
        codes = reader.expect(at, np.full(n, self.table.index("image code")))
        reader.one(at + n, "image end")
        return Segment("image", codes.reshape(SIDE, SIDE)), at + n + 1

    def _write(self, segment: Segment) -> np.ndarray:
        if segment.codes.shape != (SIDE, SIDE):
            raise VocabularyError(
                f"an image of {'x'.join(map(str, segment.codes.shape))} codes; {self.name} can only hold {SIDE}x{SIDE}"
            )
        ids = self.table.members
        return np.concatenate([ids["image start"], ids["image code"][segment.codes].reshape(-1), ids["image end"]])


class LuminaMGPT(Chameleon):
    """Lumina-mGPT: Chameleon's ids, with a size in grids of 2 x 2 codes and an end of row behind each row.

    Sides are 2, 4, .. 128 codes. Arguments and errors as for ``Chameleon``.
    """

    name = "lumina-mgpt"
    source = "github.com/Alpha-VLLM/Lumina-mGPT: lumina_mgpt/data/item_processor.py, lumina_mgpt/inference_solver.py"

    def _literals(self) -> dict[str, tuple[str, ...]]:
        return {**super()._literals(), "row end": (ROW_END,), "size token": GRIDS}

    def _read(self, reader: Reader, at: int, opening: str) -> tuple[Segment, int]:
        h, w = (2 * (reader.one(at + i, "size token") + 1) for i in (0, 1))
        codes, at = reader.rows(at + 2, h, w, "image code", "row end")
        reader.one(at, "image end")
        return Segment("image", codes), at + 1

    def _write(self, segment: Segment) -> np.ndarray:
        h, w = segment.codes.shape
        if h % 2 or w % 2 or max(h, w) > 2 * MAX_GRIDS:
            raise VocabularyError(
                f"an image of {h}x{w} codes; {self.name} can only hold even sides of 2..{2 * MAX_GRIDS} codes, for its "
                "sizes count grids of 32 pixels"
            )
        ids = self.table.members
        grids = ids["size token"][np.array([h, w]) // 2 - 1]
        rows = np.column_stack([ids["image code"][segment.codes], np.repeat(ids["row end"], h)])
        return np.concatenate([ids["image start"], grids, rows.reshape(-1), ids["image end"]])
