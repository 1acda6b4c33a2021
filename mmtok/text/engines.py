"""The fastest installed engine whose ids are those of Hugging Face ``tokenizers``.

``Encoder`` -- one model's engine, found and proven on construction; ``tokenizers`` itself takes over where it fails
``ENGINES`` -- the candidates, in the order in which they are tried: fastokens, gigatoken, tiktoken; each is optional

An engine is used only if it gives the very ids of ``tokenizers`` on all of :func:`mmtok.text.probes.texts_for`, cold
and warm, in a batch and alone. Whatever else it does (it is not installed, does not know this sort of model, raises,
panics, takes literals such as ``<|endoftext|>`` for special tokens), it is passed over.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, ClassVar, Protocol

import numpy as np
from tokenizers import Tokenizer

from mmtok.text import probes

# What a foreign engine may raise for a fault of its own; Rust panics are told apart by their name.
_FAULTS = (
    ArithmeticError, AttributeError, BufferError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


class Engine(Protocol):
    """Turns texts into ids. Texts are valid Unicode, of a length that the caller bounds.

    Args:
        tokenizer_json: the canonical file.
        id_to_bytes: the bytes of each id.

    Raises anything where it cannot do that model or that text.
    """

    name: ClassVar[str]

    def __init__(self, tokenizer_json: str, id_to_bytes: Sequence[bytes]) -> None: ...

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids in a row, any integers [n]; and where each text's ids begin, and at last n, integers [texts + 1]."""
        ...


class Fastokens:
    """https://github.com/crusoecloud/fastokens: all cores, and a cache of bounded size."""

    name: ClassVar[str] = "fastokens"

    def __init__(self, tokenizer_json: str, id_to_bytes: Sequence[bytes]) -> None:
        self._tokenizer = importlib.import_module("fastokens").Tokenizer.from_json_str(tokenizer_json)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, bounds = self._tokenizer.encode_batch_flat(texts)
        return np.frombuffer(ids, "<u4"), np.frombuffer(bounds, "<u8").astype(np.int64)


class Gigatoken:
    """https://github.com/marcelroed/gigatoken: all cores, but one in a worker process.

    Its cache of words grows for ever (1 GB after 144 MB of random words), so it is made anew now and then.
    """

    name: ClassVar[str] = "gigatoken"
    renewal = 32_000_000  # characters

    def __init__(self, tokenizer_json: str, id_to_bytes: Sequence[bytes]) -> None:
        self._json = tokenizer_json
        self._make = importlib.import_module("gigatoken").Tokenizer.from_json
        self._tokenizer = self._make(tokenizer_json)
        self._characters = 0

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        self._characters += sum(map(len, texts))
        if self._characters > self.renewal:
            self._tokenizer, self._characters = self._make(self._json), 0
        layout = self._tokenizer.encode_batch(texts).layout
        bounds = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[bounds[0] : bounds[-1]], bounds - bounds[0]


class Tiktoken:
    """https://github.com/openai/tiktoken: one core.

    It merges by the ids of the results, ``tokenizers`` by the list of merges. Both are the same if the merges come in
    the order of their results' ids, no two have one result, and each token's own bytes give that token: then two
    neighbours whose joint bytes are a token are always the pair that its merge names.
    """

    name: ClassVar[str] = "tiktoken"

    def __init__(self, tokenizer_json: str, id_to_bytes: Sequence[bytes]) -> None:
        spec = json.loads(tokenizer_json)
        split, byte_level = spec["pre_tokenizer"]["pretokenizers"]
        pairs = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
        results = [spec["model"]["vocab"][left + right] for left, right in pairs]
        # With ignore_merges a token that is a whole word would count as reached.
        plain = json.dumps({**spec, "model": {**spec["model"], "ignore_merges": False}})
        model = Tokenizer.from_str(plain).model
        same = {
            "split": (split["type"], split["behavior"], split["invert"]) == ("Split", "Isolated", False),
            "bytes": (byte_level["type"], byte_level["add_prefix_space"]) == ("ByteLevel", False),
            "one split": not byte_level["use_regex"],
            "order": results == sorted(set(results)) and len(results) + 256 == len(id_to_bytes),
            "reached": all(len(model.tokenize(token)) == 1 for token in spec["model"]["vocab"]),
        }
        if not all(same.values()):
            raise ValueError(f"tiktoken would merge or split in another way: {same}")
        self._encoding = importlib.import_module("tiktoken").Encoding(
            "mmtok",
            pat_str=split["pattern"]["Regex"],
            mergeable_ranks={token: i for i, token in enumerate(id_to_bytes)},
            special_tokens={},
        )

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return _flat([*map(self._encoding.encode_ordinary, texts)])


class Tokenizers:
    """Hugging Face ``tokenizers``, which defines the ids."""

    name: ClassVar[str] = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return _flat([encoding.ids for encoding in encodings])

    def encode_alone(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same, one by one on this thread: a process that forks later is not warned of threads."""
        return _flat([self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts])


# The first two are equally fast on text read once (benchmarks/text_speed.py); fastokens needs bounded memory.
# Case folding makes this s, and 's is a word of its own in many splits; fastokens does not fold. Whether that changes
# ids depends on the merges around it, which no examples exhaust: texts that hold it are left to tokenizers.
DOUBTFUL = "\N{LATIN SMALL LETTER LONG S}"

ENGINES: tuple[type[Engine], ...] = (Fastokens, Gigatoken, Tiktoken)


class Encoder:
    """One model's way from texts to ids.

    Args:
        tokenizer: the model in ``tokenizers``.
        tokenizer_json: its file.
        id_to_bytes: the bytes of each id.
    """

    def __init__(self, tokenizer: Tokenizer, tokenizer_json: str, id_to_bytes: Sequence[bytes]) -> None:
        self._reference = Tokenizers(tokenizer)
        self._engine: Engine | None = None
        texts = probes.texts_for(id_to_bytes)
        expected: tuple[np.ndarray, np.ndarray] | None = None
        for candidate in ENGINES:
            engine = _attempt(candidate, tokenizer_json, id_to_bytes)
            if engine is None:
                continue
            expected = expected or self._reference.encode_alone(texts)
            if _attempt(_agrees, engine, texts, expected):
                self._engine = engine
                break

    @property
    def name(self) -> str:
        """fastokens, gigatoken, tiktoken or tokenizers."""
        return (self._engine or self._reference).name

    def encode(self, texts: list[str]) -> tuple[np.ndarray, list[int]]:
        """The ids of all texts in a row, int64 [n], and where each text's begin, and at last n."""
        doubtful = [i for i, text in enumerate(texts) if DOUBTFUL in text] if self._engine else []
        if not doubtful:
            found = None if self._engine is None else _attempt(self._engine.encode, texts)
            ids, bounds = found or self._reference.encode(texts)
            return ids.astype(np.int64), bounds.tolist()
        rows: list[np.ndarray] = [np.zeros(0, np.int64)] * len(texts)
        sure = sorted(set(range(len(texts))) - set(doubtful))
        ids, ends = self.encode([texts[i] for i in sure])
        rare, rare_ends = self._reference.encode([texts[i] for i in doubtful])
        for chosen, values, borders in ((sure, ids, ends), (doubtful, rare, rare_ends.tolist())):
            for i, start, end in zip(chosen, borders, borders[1:], strict=False):
                rows[i] = values[start:end].astype(np.int64)
        return np.concatenate(rows), [0, *accumulate(map(len, rows))]


def _agrees(engine: Engine, texts: list[str], expected: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether an engine gives these ids: in one batch, again with its caches warm, and each of some texts alone."""
    ids, bounds = expected
    for _ in range(2):
        got = engine.encode(texts)
        if not (np.array_equal(got[0], ids) and np.array_equal(got[1], bounds)):
            return False
    some = [*range(0, len(texts), 16), len(texts) - 1]
    return all(np.array_equal(engine.encode([texts[i]])[0], ids[bounds[i] : bounds[i + 1]]) for i in some)


def _attempt(action: Any, *arguments: Any) -> Any:
    """What a foreign engine gives; None where it fails."""
    try:
        return action(*arguments)
    except _FAULTS:
        return None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return None


def _flat(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    bounds = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=bounds[1:])
    return np.fromiter(chain.from_iterable(rows), np.int64, int(bounds[-1])), bounds
