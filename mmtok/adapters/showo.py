"""Show-o: square images of a fixed size between <|soi|> and <|eoi|>.

github.com/showlab/Show-o: ``training/prompting_utils.py`` appends [PAD] and nine special tokens to a text tokenizer of
50295 (``llm_vocab_size`` in ``configs/showo_demo.yaml``) in the order <|soi|> <|eoi|> <|sov|> <|eov|> <|t2i|> <|mmu|>
<|t2v|> <|v2v|> <|lvg|>; an image id is code + the size of all that (``inference_t2i.py``); the last of the 58498 ids is
the mask (``models/modeling_showo.py``). 256 codes an image, or 1024 in the 512 x 512 configurations. An image with
masks left in it is refused: it has not been generated to the end. So are the codes of a video (<|sov|>).
"""

from __future__ import annotations

import numpy as np

from mmtok.adapters.base import Segment
from mmtok.adapters.flat import Flat, Reader, Table
from mmtok.blocks import TokenizerSpec, is_int
from mmtok.errors import VocabularyError

SIZE, TEXT_SIZE, CODES = 58498, 50305, 8192


class ShowO(Flat):
    """Show-o.

    Args:
        side: of its images, in codes: 16, or 32 for the 512 x 512 checkpoints.

    Raises:
        VocabularyError: the side is not a positive integer.
    """

    name = "show-o"
    source = "github.com/showlab/Show-o: training/prompting_utils.py, inference_t2i.py, configs/showo_demo.yaml"
    openings = ("image start",)

    def __init__(self, side: int = 16) -> None:
        if not is_int(side) or side < 1:
            raise VocabularyError(f"side {side!r}, expected an integer from 1 up")
        self.side = int(side)
        codes = np.arange(TEXT_SIZE, TEXT_SIZE + CODES)
        self.table = Table(SIZE, {"image start": 50296, "image end": 50297, "image code": codes, "mask": SIZE - 1})
        self.specs = (
            TokenizerSpec("text", "text", (TEXT_SIZE,), "published:show-o/text"),
            TokenizerSpec("image", "image", (CODES,), "published:show-o/magvitv2", properties={"downsample": 16}),
        )

    def _read(self, reader: Reader, at: int, opening: str) -> tuple[Segment, int]:
        n = self.side**2
        due = np.full(min(n, len(reader) - at + 1), self.table.index("image code"))
        codes = reader.expect(at, due).reshape(self.side, self.side)
        reader.one(at + n, "image end")
        return Segment("image", codes), at + n + 1

    def _write(self, segment: Segment) -> np.ndarray:
        if segment.codes.shape != (self.side, self.side):
            raise VocabularyError(
                f"an image of {'x'.join(map(str, segment.codes.shape))} codes; this {self.name} can only hold "
                f"{self.side}x{self.side}; ShowO(side=...) sets another"
            )
        ids = self.table.members
        return np.concatenate([ids["image start"], ids["image code"][segment.codes].reshape(-1), ids["image end"]])
