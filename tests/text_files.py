"""Files of text tokenizers as others write them, trained in a moment, and the texts to compare ids on."""

from __future__ import annotations

import argparse
import base64
import functools
import inspect
import json
import textwrap
import turtle
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmtok.text import probes
from mmtok.text.bytelevel import PATTERN, byte_of_character


@functools.cache
def corpus() -> tuple[str, ...]:
    """Real text: source and documentation of Python's library, and prose in many scripts."""
    modules = [inspect.getsource(module) for module in (argparse, textwrap, inspect)]
    return (*modules, inspect.getdoc(turtle) or "", *probes.PROSE, *modules[0].split("\n\n"))


@functools.cache
def trained(vocab_size: int = 1000, alphabet: bool = True) -> dict[str, Any]:
    """The parsed tokenizer.json of a byte-level BPE in the manner of Llama 3, without added tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(c for c, b in byte_of_character().items() if alphabet or b not in (0xC0, 0xC1, *range(0xF5, 256)))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return json.loads(tokenizer.to_str())


def added(id: int, content: str, special: bool = True, **more: bool) -> dict[str, Any]:
    """An entry of added_tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, **flags, "special": special, **more}


def shifted(spec: dict[str, Any], by: int) -> dict[str, int]:
    """Its vocabulary, each id ``by`` higher."""
    return {token: id + by for token, id in spec["model"]["vocab"].items()}


def write(path: Path, spec: dict[str, Any]) -> Path:
    """Write a tokenizer.json."""
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def token_bytes(spec: dict[str, Any]) -> dict[bytes, int]:
    """Bytes -> id of a byte-level vocabulary."""
    table = byte_of_character()
    return {bytes(table[c] for c in token): id for token, id in spec["model"]["vocab"].items()}


def write_tiktoken(path: Path, ranks: dict[bytes, int]) -> Path:
    """Write a .tiktoken file."""
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path
