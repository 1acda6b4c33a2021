"""A .tiktoken file (https://github.com/openai/tiktoken) as a byte-level BPE: one token in base64 and its rank a line.

``import_tiktoken`` -- the importer
``ENCODINGS``       -- OpenAI's encodings: how they split text into words, and their special tokens
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import importlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtok.errors import CheckpointError
from mmtok.sniffing import one_line
from mmtok.text.bpe import ByteLevelBPE
from mmtok.text.bytelevel import PATTERN
from mmtok.text.published.base import MAX_ID, Imported, check_ids, parse, piece, probe_texts, read_file, unspoken

_MAX_TOKEN = 2000  # bytes; the longest in use have some hundred
_END = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How one of OpenAI's encodings differs from the next, as tiktoken_ext/openai_public.py has it.

    Attributes:
        size: ranks in the published file.
        pattern: tiktoken's regular expression of words.
        words: the same for the regular expressions of ``tokenizers``; None is GPT-2's, which it has built in.
        special: name -> id.
    """

    size: int
    pattern: str
    words: str | None
    special: dict[str, int]


_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
ENCODINGS = {
    "gpt2": Encoding(50256, _GPT2, None, {_END: 50256}),
    "r50k_base": Encoding(50256, _GPT2, None, {_END: 50256}),
    "p50k_base": Encoding(50280, _GPT2, None, {_END: 50256}),
    "cl100k_base": Encoding(100256, _CL100K, PATTERN, {_END: 100257, **_FIM, "<|endofprompt|>": 100276}),
    "o200k_base": Encoding(199998, _O200K, _O200K, {_END: 199999, "<|endofprompt|>": 200018}),
}


def import_tiktoken(path: str | Path, pattern: str | None = None) -> Imported:
    """A byte-level BPE out of a .tiktoken file, with the same ids.

    tiktoken keeps no merges: any two neighbours whose joint bytes are a token are merged, that of the lowest rank
    first. The one pair that can make a token is found by merging its bytes so. A token that merges do not make stands
    for a whole word only, which ``ignore_merges`` says.

    Args:
        path: the file.
        pattern: how text is split into words, which the file does not say: a name in :data:`ENCODINGS`, or a regular
            expression of tiktoken. If it is left out, the file must have such a name.

    Raises:
        CheckpointError: the file is damaged or no such file, the pattern is missing or none, or the ids are not those
            of tiktoken, if that is installed.
    """
    file, data = read_file(path, "a .tiktoken file")
    pattern = pattern or file.stem
    known = ENCODINGS.get(pattern)
    if known is None and re.fullmatch(r"[\w.-]*", pattern):
        raise CheckpointError(
            f"{file} does not say how it splits text into words, and {pattern!r} names no way; give --pattern, one of "
            f"{', '.join(ENCODINGS)} or a regular expression"
        )
    ranks = _read(file, data)
    notes = []
    vocab = {piece(token): rank for token, rank in ranks.items()}
    if known and known.size != len(ranks):
        notes.append(f"{len(ranks)} ranks are not the {known.size} of {pattern}, so its special tokens are left out")
    elif known:
        notes.append(f"the special tokens of {pattern} keep their ids, but no text gives them")
        vocab |= {unspoken(name, vocab): id for name, id in known.special.items()}
    used = set(vocab.values())
    vocab |= {unspoken(f"<|unused_{id}|>", vocab): id for id in range(max(used)) if id not in used}
    merges, whole = _merges(ranks)
    if whole:
        notes.append(f"{len(whole)} tokens are no result of merges, and stand for whole words only, as in tiktoken")
    words = known.words if known else _for_tokenizers(pattern)
    value: dict[str, Any] = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [],
        "pre_tokenizer": _pre_tokenizer(words),
        "decoder": _byte_level(False),
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **{"fuse_unk": False, "byte_fallback": False, "ignore_merges": bool(whole)},
            "vocab": dict(sorted(vocab.items(), key=lambda entry: entry[1])),
            "merges": [(piece(a), piece(b)) for a, b in merges],
        },
    }
    try:
        tokenizer = ByteLevelBPE(parse(json.dumps(value), f"tokenizers cannot use the pattern {pattern!r}").to_str())
    except CheckpointError as error:
        raise CheckpointError(f"{file} cannot be imported: {error}") from error
    texts = probe_texts(tokenizer)
    originals = _originals(ranks, known.pattern if known else pattern, texts)
    compared = None if originals is None else check_ids(tokenizer, texts, originals, str(file), "tiktoken")
    return Imported(tokenizer, tuple(notes), "tiktoken", compared)


def _read(file: Path, data: bytes) -> dict[bytes, int]:
    """Token -> rank."""
    ranks: dict[bytes, int] = {}
    taken: set[int] = set()
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        fault = None
        try:
            encoded, digits = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(digits[:9])
        except (ValueError, binascii.Error):
            token, rank, fault = b"", 0, f"is {line[:40]!r}"
        if fault is None and not (
            0 < len(token) <= _MAX_TOKEN and digits.isdigit() and len(digits) < 9 and rank < MAX_ID
        ):
            fault = f"has a token of {len(token)} bytes and the rank {digits[:20].decode()}"
        if fault is None and (token in ranks or rank in taken):
            fault = f"has a token or a rank ({rank}) that stands there already"
        if fault is not None:
            raise CheckpointError(
                f"{file} is damaged or no .tiktoken file: line {number} {fault}; expected a token in base64 and its "
                "rank, each once"
            )
        ranks[token] = rank
        taken.add(rank)
    missing = 256 - sum(bytes([byte]) in ranks for byte in range(256))
    if missing:
        raise CheckpointError(f"{file} is cut short or no .tiktoken file: {missing} of the 256 bytes have no rank")
    return ranks


def _merges(ranks: dict[bytes, int]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """The pair that makes each token, by rank; and the tokens that no merge makes.

    Within a token's bytes tiktoken merges in one order, whatever stands around them, so the two parts that are left
    before the last merge are the only two that can become the token.
    """
    pairs, whole = [], []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            found = [(ranks.get(a + b, MAX_ID), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
            rank, i = min(found)
            if rank == MAX_ID:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
        else:
            whole.append(token)
    return pairs, whole


def _for_tokenizers(pattern: str) -> str:
    """A regular expression of tiktoken for ``tokenizers``, where ``$`` ends a line and ``{1,3}+`` repeats."""
    if re.search(r"\)\{\d+(,\d*)?\}\+", pattern):
        raise CheckpointError(f"the pattern {pattern!r} repeats a group with {{}}+, which mmtok cannot translate")
    atoms = r"\\[pP]\{\^?\w+\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\]"
    out: list[str] = []
    for match in re.finditer(rf"(?P<possessive>({atoms})(\{{\d+(?:,\d*)?\}})\+)|{atoms}", pattern, re.DOTALL):
        atom = match[0]
        if match["possessive"]:
            out.append(f"(?>{atom[:-1]})")
        else:
            out.append({"$": r"\z", "^": r"\A"}.get(atom, atom))
    return "".join(out)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


def _pre_tokenizer(words: str | None) -> dict[str, Any]:
    if words is None:
        return _byte_level(True)
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


def _originals(ranks: dict[bytes, int], pattern: str, texts: Sequence[str]) -> list[list[int] | None] | None:
    """The ids by tiktoken of the texts that it gives back; None if it is not installed.

    Raises:
        CheckpointError: the pattern is no regular expression of its.
    """
    try:
        library = importlib.import_module("tiktoken")
    except ImportError:
        return None
    try:
        encoding = library.Encoding("imported", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise CheckpointError(f"tiktoken cannot use the pattern {pattern!r}: {one_line(error)}") from error
    found = ((text, encoding.encode_ordinary(text)) for text in texts)
    return [ids if encoding.decode_bytes(ids) == text.encode() else None for text, ids in found]
