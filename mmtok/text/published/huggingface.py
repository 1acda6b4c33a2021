"""A tokenizer.json of Hugging Face ``tokenizers`` (GPT-2, GPT-NeoX, Llama 3, Qwen, ...) as a text tokenizer of mmtok.

The ids of text are the original's, every id keeps its number, and no text gives the id of an added token, be it special
or not (``<|endoftext|>``, ``<tool_call>``): such a token becomes an :func:`~mmtok.text.published.base.unspoken` name.
Added tokens of white space alone, as GPT-NeoX has them, are text and stay text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from mmtok.errors import CheckpointError
from mmtok.text.bpe import ByteLevelBPE
from mmtok.text.bytelevel import BYTES, FILE
from mmtok.text.published.base import MAX_ID, Imported, check_ids, parse, piece, probe_texts, read_file, shown, unspoken
from mmtok.text.unigram import ByteLevelUnigram

_CLASSES = {"BPE": ByteLevelBPE, "Unigram": ByteLevelUnigram}


def import_tokenizers(path: str | Path) -> Imported:
    """A byte-level BPE or Unigram out of a tokenizer.json.

    A normaliser is left out, because it loses text; so are a space put before each text, dropout, truncation, and what
    is put around a text. The notes say what that changes.

    Args:
        path: the file, or a directory with a tokenizer.json.

    Raises:
        CheckpointError: it is no such file, its model is no byte-level one, or its ids cannot be had.
    """
    file, data = read_file(path, f"a {FILE}", FILE)
    try:
        spec = json.loads(data.decode("utf-8"))
        model = spec["model"]
        kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
        vocab = {str(token): id for token, id in _vocabulary(model).items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is no {FILE} ({type(error).__name__}: {error}); fetch it again") from error
    if kind not in _CLASSES:
        raise CheckpointError(
            f"{file} holds a {kind} model, which loses what it does not know; mmtok reads byte-level BPE and Unigram"
        )
    if not set(map(piece, BYTES)) <= vocab.keys():
        raise CheckpointError(
            f"{file} holds a {kind} model that is not byte-level; if it was made from a SentencePiece model with byte "
            "fallback, import that: mmtok import sentencepiece tokenizer.model"
        )
    model["dropout"] = None
    original = parse(json.dumps(spec), f"{file} is damaged or no {FILE}")
    original.no_truncation()
    original.no_padding()
    added = original.get_added_tokens_decoder()
    if max([*vocab.values(), *added]) >= MAX_ID:
        raise CheckpointError(f"{file} has the id {max([*vocab.values(), *added])}, expected fewer than {MAX_ID} ids")
    notes: list[str] = []
    spaces = {id: token for id, token in added.items() if _is_space(token, vocab, model)}
    silent = {id: token.content for id, token in added.items() if id not in spaces}
    if silent:
        notes.append(
            f"{len(silent)} added tokens ({shown(list(silent.values()))}) keep their ids, but no text gives them"
        )
    prefix = _leave_out(spec, notes)
    if spaces:
        _keep_spaces(spec, vocab, spaces)
    _set_vocabulary(model, kind, _spellings(vocab, silent))
    try:
        if model.get("ignore_merges"):
            spoken = [token for token, id in vocab.items() if id not in silent]
            model["ignore_merges"] = not _merges_suffice(spec, spoken)
        tokenizer = _CLASSES[kind](parse(json.dumps(spec), "tokenizers cannot use it").to_str())
    except CheckpointError as error:
        raise CheckpointError(f"{file} cannot be imported: {error}") from error
    texts = probe_texts(tokenizer)
    normalize = original.normalizer.normalize_str if original.normalizer else str
    originals = [
        original.encode(text, add_special_tokens=False).ids
        if normalize(text) == text and text.startswith(prefix) and not any(x in text for x in silent.values())
        else None
        for text in texts
    ]
    return Imported(
        tokenizer, tuple(notes), "tokenizers", check_ids(tokenizer, texts, originals, str(file), "tokenizers")
    )


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """Token -> id of a BPE model, which lists them so, or of a Unigram model, which lists (token, score)."""
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {token: id for id, (token, _) in enumerate(vocab)}


def _set_vocabulary(model: dict[str, Any], kind: str, vocab: dict[str, int]) -> None:
    """Put ids into a model, without what makes tokens that are no longer there."""
    tokens = sorted(vocab, key=vocab.__getitem__)
    if kind == "Unigram":
        scores = dict(model["vocab"])
        model |= {"type": kind, "unk_id": None, "vocab": [(token, scores.get(token, 0.0)) for token in tokens]}
        return
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    merges = [(a, b) for a, b in pairs if a in vocab and b in vocab and a + b in vocab]
    model |= {"type": kind, "unk_token": None, "vocab": {token: vocab[token] for token in tokens}, "merges": merges}


def _is_space(token: AddedToken, vocab: dict[str, int], model: dict[str, Any]) -> bool:
    """Whether an added token is white space that the model can make out of its bytes too."""
    plain = not (token.special or token.single_word or token.lstrip or token.rstrip)
    merged = ("".join(m.split(" ")) if isinstance(m, str) else "".join(m) for m in model.get("merges", ()))
    return plain and token.content.isspace() and piece(token.content.encode()) in merged


def _merges_suffice(spec: dict[str, Any], tokens: list[str]) -> bool:
    """Whether the merges give each of these tokens, so that ``ignore_merges`` says nothing and can be left out."""
    plain = {**spec, "model": {**spec["model"], "ignore_merges": False}}
    model = parse(json.dumps(plain), "tokenizers cannot use it").model
    return all(len(model.tokenize(token)) == 1 for token in tokens)


def _leave_out(spec: dict[str, Any], notes: list[str]) -> str:
    """Drop from a tokenizer.json what changes text or surrounds it. Returns what text the original's ids need first."""
    if spec.get("normalizer") is not None:
        inner = spec["normalizer"].get("normalizers", [spec["normalizer"]])
        names = ", ".join(str(n["type"]) for n in inner)
        notes.append(
            f"the original normalises text first ({names}) and mmtok does not, to give every text back: ids are the "
            "original's for text that is in that form already"
        )
    words = spec.get("pre_tokenizer") or {}
    prefix = ""
    if words.get("type") == "ByteLevel" and words.get("add_prefix_space"):
        words["add_prefix_space"], prefix = False, " "
        notes.append("the original puts a space before each text: ids are its own for text that begins with one")
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    dropped = dict.fromkeys(("normalizer", "post_processor", "truncation", "padding"))
    spec |= {**dropped, "decoder": decoder, "added_tokens": []}
    return prefix


def _keep_spaces(spec: dict[str, Any], vocab: dict[str, int], spaces: dict[int, AddedToken]) -> None:
    """Let runs of white space that were added tokens be words, and their bytes the added tokens' ids."""
    longest = sorted((token.content for token in spaces.values()), key=len, reverse=True)
    pattern = "|".join("".join(f"\\x{{{ord(c):x}}}" for c in run) for run in longest)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    before = [spec["pre_tokenizer"]] if spec.get("pre_tokenizer") else []
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, *before]}
    for id, token in spaces.items():
        key = piece(token.content.encode())
        if vocab[key] != id:
            vocab[unspoken(token.content, vocab)] = vocab.pop(key)
            vocab[key] = id


def _spellings(vocab: dict[str, int], silent: dict[int, str]) -> dict[str, int]:
    """Token -> id for every id from 0 to the largest; no text gives the ``silent`` ones and the unused."""
    out = {token: id for token, id in vocab.items() if id not in silent}
    for id, name in silent.items():
        out[unspoken(name, out)] = id
    have = set(out.values())
    for id in range(max(have) + 1):
        if id not in have:
            out[unspoken(f"<|unused_{id}|>", out)] = id
    return out
