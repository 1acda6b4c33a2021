"""AnyGPT: images of 32 codes, speech of one level, music of four levels, appended to LLaMA's vocabulary.

github.com/OpenMOSS/AnyGPT: ``anygpt/src/m_utils/anything2token.py`` has the names and sizes, and writes an RVQ code as
code + 2048 * level, frame by frame; ``anygpt/src/train/stage1_pretrain.py`` appends to the 32000 ids of LLaMA, in this
order, four role tokens, and for image (8192 codes), speech (1024) and music (4 x 2048) the codes, the start and the
end. ``stage2_sft.py`` appends two more special tokens, <-Res-> and <-Ins->, at the very end; the ids of that chat model
are the default here. An image has 32 codes (``num_query_token`` in ``seed2/seed_qformer/qformer_quantizer.py``), here
[1, 32]. Speech is the first level of SpeechTokenizer, music is EnCodec at 32 kHz (``cli_infer_base_model.py``).

AnyGPT's own decoding takes codes ``% 2048`` and drops an incomplete last frame: wrong levels go unseen.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmtok.adapters.base import Segment
from mmtok.adapters.flat import Flat, Reader, Table, lookup, vocabulary_size
from mmtok.blocks import TokenizerSpec
from mmtok.errors import VocabularyError
from mmtok.layouts import Interleaved

LLAMA, ROLES, CHAT = 32000, 4, 2  # ids of the text model; special tokens before and behind the codes
IMAGE_CODES = 32
LEVELS, LEVEL_SIZE = 4, 2048
# tokenizer -> prefix of the names of its codes (eyes, a speaking head, notes), start, end, codes; in order of the ids
MEDIA = {
    "image": ("\U0001f440", "<soim>", "<eoim>", 8192),
    "speech": ("\U0001f5e3\ufe0f", "<sosp>", "<eosp>", 1024),
    "music": ("\U0001f3b6", "<somu>", "<eomu>", LEVELS * LEVEL_SIZE),
}
SIZE = LLAMA + ROLES + sum(n + 2 for *_, n in MEDIA.values()) + CHAT


def published() -> dict[str, int]:
    """Name -> id of the codes, starts and ends, in the order in which the training scripts append them."""
    out: dict[str, int] = {}
    for prefix, start, end, n in MEDIA.values():
        for name in (*(f"<{prefix}{code}>" for code in range(n)), start, end):
            out[name] = LLAMA + ROLES + len(out)
    return out


class AnyGPT(Flat):
    """AnyGPT.

    Args:
        vocabulary: name -> id of its text tokenizer (``get_vocab()``), if other than that of the chat model.

    Raises:
        VocabularyError: not the vocabulary of an AnyGPT.
    """

    name = "anygpt"
    source = "github.com/OpenMOSS/AnyGPT: anygpt/src/m_utils/anything2token.py, anygpt/src/train/stage1_pretrain.py"
    openings = ("image start", "speech start", "music start")

    def __init__(self, vocabulary: Mapping[str, int] | None = None) -> None:
        size = SIZE if vocabulary is None else vocabulary_size(vocabulary)
        names = published() if vocabulary is None else vocabulary
        kinds: dict[str, np.ndarray] = {}
        for medium, (prefix, start, end, n) in MEDIA.items():
            codes = np.array(lookup(names, [f"<{prefix}{code}>" for code in range(n)]))
            if medium == "music":
                kinds.update({f"music level {level} code": codes.reshape(LEVELS, -1)[level] for level in range(LEVELS)})
            else:
                kinds[f"{medium} code"] = codes
            kinds[f"{medium} start"], kinds[f"{medium} end"] = (np.array(lookup(names, [x])) for x in (start, end))
        self.table = Table(size, kinds)
        self._levels = {"speech": ["speech code"], "music": [f"music level {level} code" for level in range(LEVELS)]}
        self.specs = (
            TokenizerSpec("text", "text", (size,), "published:anygpt/text"),
            TokenizerSpec("image", "image", (8192,), "published:anygpt/seed-2"),
            TokenizerSpec("speech", "audio", (1024,), "published:anygpt/speechtokenizer"),
            TokenizerSpec(
                "music",
                "audio",
                (LEVEL_SIZE,) * LEVELS,
                "published:anygpt/encodec-32khz",
                properties={"sample_rate": 32000, "hop": 640},
            ),
        )

    def _read(self, reader: Reader, at: int, opening: str) -> tuple[Segment, int]:
        medium = opening.removesuffix(" start")
        if medium == "image":
            codes = reader.expect(at, np.full(IMAGE_CODES, self.table.index("image code")))
            reader.one(at + IMAGE_CODES, "image end")
            return Segment("image", codes.reshape(1, IMAGE_CODES)), at + IMAGE_CODES + 1
        names, end = self._levels[medium], reader.next(at, f"{medium} end")
        k, n = len(names), end - at
        due = self.table.index(names[0]) + Interleaved(k).levels(-(-n // k))[:n]
        wrong = np.flatnonzero(reader.kinds[at:end] != due)
        bad = at + int(wrong[0]) if len(wrong) else end
        level = (bad - at) % k
        if len(wrong) or level or end == len(reader):
            raise reader.error(bad, names[level] if level else f"{names[0]} or {medium} end")
        return Segment(medium, Interleaved(k).unflatten(reader.codes[at:end])), end + 1

    def _write(self, segment: Segment) -> np.ndarray:
        ids, medium = self.table.members, segment.tokenizer
        if medium == "image":
            if segment.codes.shape != (1, IMAGE_CODES):
                raise VocabularyError(
                    f"an image of {'x'.join(map(str, segment.codes.shape))} codes; {self.name} can only hold "
                    f"1x{IMAGE_CODES}"
                )
            codes = ids["image code"][segment.codes[0]]
        else:
            levels = [ids[name][row] for name, row in zip(self._levels[medium], segment.codes, strict=True)]
            codes = Interleaved(len(levels)).flatten(np.stack(levels))
        return np.concatenate([ids[f"{medium} start"], codes, ids[f"{medium} end"]])
