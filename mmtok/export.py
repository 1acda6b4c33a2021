"""A vocabulary as a Hugging Face tokenizer: the same ids under ``AutoTokenizer``, in any program that reads its files.

export_hf       -- write tokenizer.json and tokenizer_config.json, checked id for id before they are put in place
exported        -- the registry that such a directory carries
read_vocabulary -- the registry of such a directory, or of any other that has one
refuse_other    -- keep a directory that holds another vocabulary
names_of_ids    -- the token string of every id

Every id of the vocabulary has a token. Text has the tokens and merges of the default text tokenizer. A code is an
entry without merges, so that no text can give it: ``<|image:5|>`` and ``<|audio.0:5|>`` are code 5 of the blocks
``image`` and ``audio.0``, ``<|grid:7|>`` is a picture side of 7 codes, ``<|unused:900|>`` an id that no block uses.
Control tokens have their own names (``<image>``) and are special; ``split_special_tokens`` in tokenizer_config.json
makes transformers read their names in a text as text. ``tokenizer(trusted, split_special_tokens=False)`` parses them.

tokenizer.json cannot carry that setting: a program that loads it with the ``tokenizers`` library alone has to set
``encode_special_tokens = True`` itself before it encodes text from strangers.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mmtok import loading
from mmtok.blocks import Block
from mmtok.checkpoints import atomic_directory
from mmtok.errors import CheckpointError, VocabularyError, VocabularyMismatchError
from mmtok.registry import VOCAB_FILE, VocabularyRegistry
from mmtok.text.bpe import FILE, ByteLevelBPE

CONFIG_FILE = "tokenizer_config.json"
KEY = "mmtok"


def export_hf(registry: VocabularyRegistry, tokenizers: Mapping[str, Any], path: str | Path) -> None:
    """Write a directory from which ``transformers.AutoTokenizer.from_pretrained`` loads this vocabulary.

    ``len(tokenizer)`` is ``registry.padded_size``. A text of up to 1,000,000 characters has the ids of the default
    text tokenizer, moved to its block. The registry travels in tokenizer_config.json, see :func:`exported`.

    Args:
        registry: the vocabulary.
        tokenizers: name -> tokenizer, with the default text tokenizer of the vocabulary among them.
        path: the directory. If it exists, as that of a transformer of this vocabulary may, its other files stay.

    Raises:
        VocabularyError: the vocabulary has no text tokenizer, two ids would have the same token, or the check of what
            was written failed.
        VocabularyMismatchError: the text tokenizer or the directory is of another vocabulary.
        CheckpointError: the directory holds a tokenizer.json that is no export.
    """
    text = _text_model(registry, tokenizers)
    names = names_of_ids(registry, text)
    contents = {FILE: _tokenizer_json(registry, text, names), CONFIG_FILE: _config_json(registry)}
    target = Path(path)
    if not target.exists():
        with atomic_directory(target) as work:
            _write(work, contents)
            _check(work, registry, text, names)
        return
    _check_target(target, registry)
    with tempfile.TemporaryDirectory(prefix=".export.", dir=target) as folder:
        work = Path(folder)
        _write(work, contents)
        _check(work, registry, text, names)
        # Without a tokenizer.json nothing loads: an interrupted export is seen, and never half old and half new.
        (target / FILE).unlink(missing_ok=True)
        for name in (CONFIG_FILE, FILE):
            os.replace(work / name, target / name)


def exported(path: str | Path) -> VocabularyRegistry:
    """The vocabulary of a directory that ``export_hf`` wrote.

    Raises:
        CheckpointError: no such directory.
        VocabularyError: its vocabulary is damaged, or not the one that its fingerprint names.
    """
    file = Path(path) / CONFIG_FILE
    try:
        value = json.loads(file.read_text(encoding="utf-8"))[KEY]
        registry = VocabularyRegistry.from_json(json.dumps(value["registry"]))
        fingerprint = value["fingerprint"]
    except VocabularyError as error:
        raise VocabularyError(f"{file}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} carries no vocabulary of mmtok; expected a directory that mmtok exported"
        ) from error
    if registry.fingerprint != fingerprint:
        raise VocabularyMismatchError(
            f"{file} names the vocabulary {str(fingerprint)[:12]}, but holds {registry.fingerprint[:12]}; one of "
            "them was edited: export the vocabulary again"
        )
    return registry


def read_vocabulary(path: str | Path) -> tuple[VocabularyRegistry, Path]:
    """As :func:`mmtok.loading.read_vocabulary`, and of a directory that ``export_hf`` wrote too."""
    place = Path(path)
    if not (place / VOCAB_FILE).is_file() and (place / CONFIG_FILE).is_file():
        return exported(place), place
    return loading.read_vocabulary(path)


def refuse_other(directory: Path, registry: VocabularyRegistry) -> None:
    """Raise if a directory holds another vocabulary than ``registry``: what was made with it would lose its meaning.

    Raises:
        VocabularyMismatchError: it does.
        VocabularyError, CheckpointError: it holds one that cannot be read.
    """
    held: dict[str, VocabularyRegistry] = {}
    if (directory / VOCAB_FILE).is_file():
        held[VOCAB_FILE] = loading.read_vocabulary(directory)[0]
    if (directory / FILE).is_file() and (directory / CONFIG_FILE).is_file():
        held[CONFIG_FILE] = exported(directory)
    for file, there in held.items():
        if there != registry:
            raise VocabularyMismatchError(
                f"{directory / file} holds another vocabulary ({there.fingerprint[:12]}, this one is "
                f"{registry.fingerprint[:12]}), and what was made with it needs it; choose another directory"
            )


def names_of_ids(registry: VocabularyRegistry, text: ByteLevelBPE) -> list[str]:
    """The token string of each id, ``registry.padded_size`` of them, all different.

    Args:
        registry: the vocabulary.
        text: its default text tokenizer.

    Raises:
        VocabularyError: two ids would have the same token, for example a text token that reads ``<image>``.
    """
    names = [f"<|unused:{id}|>" for id in range(registry.padded_size)]
    default = registry.blocks_of("text")[0]
    for block in registry.blocks:
        names[block.start : block.end] = _text_names(text) if block == default else _block_names(block)
    first: dict[str, int] = {}
    for id, name in enumerate(names):
        if first.setdefault(name, id) != id:
            raise VocabularyError(
                f"ids {first[name]} ({registry.describe(first[name])}) and {id} ({registry.describe(id)}) would both "
                f"be the token {name!r}; train the text tokenizer without that string"
            )
    return names


def _block_names(block: Block) -> Sequence[str]:
    if block.modality == "control":
        return block.names
    base = 1 if block.modality == "grid" else 0  # a grid id is named by the size that it stands for
    return [f"<|{block.name}:{code + base}|>" for code in range(block.size)]


def _text_names(text: ByteLevelBPE) -> list[str]:
    vocab = json.loads(text.tokenizer_json)["model"]["vocab"]
    return sorted(vocab, key=vocab.__getitem__)


def _text_model(registry: VocabularyRegistry, tokenizers: Mapping[str, Any]) -> ByteLevelBPE:
    """The default text tokenizer, if it is the one that the registry means."""
    if not any(spec.modality == "text" for spec in registry.tokenizers):
        raise VocabularyError("the vocabulary has no text tokenizer, a Hugging Face tokenizer needs one; extend it")
    spec = registry.tokenizer("text")
    text = tokenizers.get(spec.name)
    if not isinstance(text, ByteLevelBPE) or text.fingerprint != spec.fingerprint:
        got = f"fingerprint {text.fingerprint[:12]}" if isinstance(text, ByteLevelBPE) else type(text).__name__
        raise VocabularyMismatchError(
            f"text tokenizer {spec.name!r}: got {got}, expected the byte-level BPE {spec.fingerprint[:12]} that the "
            "vocabulary was made with"
        )
    return text


def _tokenizer_json(registry: VocabularyRegistry, text: ByteLevelBPE, names: Sequence[str]) -> str:
    spec = json.loads(text.tokenizer_json)
    model = spec["model"]
    if model.get("ignore_merges"):
        # It makes a word of the text that is in the vocabulary one id, merges or not. Where the merges of each token
        # give that token, it changes nothing, and without it no text can give a code.
        plain = Tokenizer.from_str(json.dumps({**spec, "model": {**model, "ignore_merges": False}})).model
        wrong = [token for token in model["vocab"] if len(plain.tokenize(token)) != 1]
        if wrong:
            raise VocabularyError(
                f"the text tokenizer sets ignore_merges and its merges do not give {len(wrong)} of its tokens "
                f"({wrong[0]!r}), so text could become a code; use a text tokenizer that its merges describe"
            )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    value = {
        **spec,
        "added_tokens": [{"id": id, "content": name, **flags} for name, id in registry.controls.items()],
        "post_processor": None,  # nothing is put around a text: <bos> and <eos> belong to a document
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {**model, "ignore_merges": False, "vocab": {name: id for id, name in enumerate(names)}},
    }
    return json.dumps(value, ensure_ascii=False) + "\n"


def _config_json(registry: VocabularyRegistry) -> str:
    roles = {"pad_token": registry.pad, "bos_token": registry.bos, "eos_token": registry.eos}
    names = {id: name for name, id in registry.controls.items()}
    value = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that both 4.57 and 5 know
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **{role: names[id] for role, id in roles.items()},
        "additional_special_tokens": [name for id, name in names.items() if id not in roles.values()],
        KEY: {"fingerprint": registry.fingerprint, "registry": json.loads(registry.to_json())},
    }
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _write(folder: Path, contents: Mapping[str, str]) -> None:
    for name, value in contents.items():
        (folder / name).write_text(value, encoding="utf-8")


def _check_target(target: Path, registry: VocabularyRegistry) -> None:
    """Refuse to put the export beside another vocabulary, or in the place of a tokenizer that is none."""
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; expected a directory, or a name that is free")
    if (target / FILE).exists():
        try:
            exported(target)
        except CheckpointError as error:
            raise CheckpointError(
                f"{target / FILE} is there already and is no export of mmtok; choose another directory"
            ) from error
    refuse_other(target, registry)


def _check(folder: Path, registry: VocabularyRegistry, text: ByteLevelBPE, names: Sequence[str]) -> None:
    """Load what was written as any other program would, and compare it with the registry, id for id."""
    tokenizer = Tokenizer.from_file(str(folder / FILE))
    tokenizer.encode_special_tokens = True
    if tokenizer.get_vocab() != {name: id for id, name in enumerate(names)}:
        raise VocabularyError("the exported tokens have other ids than the vocabulary; nothing was written")
    wrong = [id for id, name in enumerate(names) if tokenizer.id_to_token(id) != name]
    if wrong:
        raise VocabularyError(
            f"{len(wrong)} exported ids, the first {wrong[0]}, have another token; nothing was written"
        )
    block = registry.blocks_of("text")[0]
    for sample in _probe(registry, text, names):
        expected = text.encode([sample])[0] + block.start
        got = np.array(tokenizer.encode(sample).ids, np.int64)
        if not np.array_equal(got, expected) or tokenizer.decode(got.tolist(), skip_special_tokens=False) != sample:
            raise VocabularyError(f"the exported tokenizer reads {sample[:40]!r} otherwise; nothing was written")


def _probe(registry: VocabularyRegistry, text: ByteLevelBPE, names: Sequence[str]) -> list[str]:
    """Texts to compare: all that the text tokenizer knows, every control token and the ends of every block by name."""
    known = text.decode(list(np.arange(text.codebook_sizes[0])[:, None]))
    ends = [id for b in registry.blocks if b.modality != "text" for id in (b.start, b.end - 1)]
    literals = [*registry.controls, *(names[id] for id in ends), "<|unused:0|>", "<|endoftext|>"]
    return ["", "".join(known), " ".join(known), *literals, "".join(literals), *(f" a{x}b\n{x}" for x in literals)]
