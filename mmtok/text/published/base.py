"""What the importers of text tokenizers share.

``Imported``       -- a tokenizer, what its user should know, and with what its ids were compared
``read_file``      -- the bytes of a published file, if it is one and of a possible size
``check_ids``      -- compare the ids with those of the original library
``parse``          -- a tokenizer.json in ``tokenizers``
``piece``          -- the name of bytes in a tokenizer.json
``unspoken``       -- the name of an id that no text gives
``probe_texts``    -- the texts to compare ids on
``shown``          -- some names, for a note
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from mmtok.errors import CheckpointError
from mmtok.sniffing import one_line
from mmtok.text import probes
from mmtok.text.bytelevel import TextTokenizer, byte_of_character

MAX_FILE = 200_000_000
MAX_ID = 1 << 22

_CHARACTER = {byte: character for character, byte in byte_of_character().items()}


@dataclasses.dataclass(frozen=True)
class Imported:
    """A published tokenizer, imported.

    Attributes:
        tokenizer: what ``save`` writes as a checkpoint.
        notes: how it differs from the original, a sentence each.
        library: the original library.
        compared: on how many texts its ids were found to be those of that library; None if it is not installed.
    """

    tokenizer: TextTokenizer
    notes: tuple[str, ...]
    library: str
    compared: int | None


def read_file(path: str | Path, what: str, name: str | None = None) -> tuple[Path, bytes]:
    """A published file and its bytes.

    Args:
        path: the file, or a directory with one of this ``name``.
        what: it should be, for messages.
        name: of the file in a directory.

    Raises:
        CheckpointError: there is none, it cannot be read, it is empty, or larger than any tokenizer.
    """
    file = Path(path)
    if name is not None and file.is_dir():
        file /= name
    try:
        if not file.is_file():
            raise CheckpointError(f"no file at {file}; expected {what}")
        size = file.stat().st_size
        if not 0 < size <= MAX_FILE:
            found = f"has {size:,} bytes, more than any tokenizer" if size else "is empty"
            raise CheckpointError(f"{file} {found}; expected {what}")
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); expected {what}") from error
    if data.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} only names a file that git lfs keeps; git lfs pull fetches it")
    return file, data


def check_ids(
    tokenizer: TextTokenizer, texts: Sequence[str], originals: Iterable[Sequence[int] | None], where: str, library: str
) -> int:
    """Compare the ids of texts with the original's.

    Args:
        tokenizer: the imported one.
        texts: to compare on.
        originals: the ids of each text by the original library; None where it need not agree.
        where: the file, for messages.
        library: the original's name, for messages.

    Returns:
        How many texts were compared.

    Raises:
        CheckpointError: they differ; the first such text is named.
    """
    count = 0
    for text, ids, original in zip(texts, tokenizer.encode(texts), originals, strict=True):
        if original is None:
            continue
        if ids.tolist() != list(original):
            raise CheckpointError(
                f"{where} is a tokenizer that mmtok cannot imitate: for {text[:40]!r} the ids of {library} begin with "
                f"{list(original[:8])}, mmtok's with {ids[:8].tolist()}"
            )
        count += 1
    return count


def parse(tokenizer_json: str, fault: str) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``.

    Raises:
        CheckpointError: it is none; ``fault`` says so, and the reason follows.
    """
    try:
        return Tokenizer.from_str(tokenizer_json)
    except BaseException as error:  # what the Rust of tokenizers raises has no class of its own
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{fault} ({one_line(error)})") from error


def piece(data: bytes) -> str:
    """Bytes as byte-level tokenizers spell them in a tokenizer.json."""
    return "".join(_CHARACTER[byte] for byte in data)


def unspoken(name: str, taken: Container[str]) -> str:
    """How a tokenizer.json spells an id that stands for no text: its name after the byte 0xFF, which no UTF-8 has.

    So no text can give the id, whatever the model. Decoded it is U+FFFD and the name.

    Args:
        name: any string.
        taken: the spellings of other ids.
    """
    spelling = piece(b"\xff" + name.encode("utf-8"))
    while spelling in taken:
        spelling = piece(b"\xff") + spelling
    return spelling


def probe_texts(tokenizer: TextTokenizer) -> list[str]:
    """The texts to compare ids on: prose in many scripts, literals, nonsense, and the tokenizer's own tokens."""
    return probes.texts_for(tokenizer.decode_bytes([[id] for id in range(tokenizer.codebook_sizes[0])]))


def shown(names: Sequence[str]) -> str:
    """The first three names, quoted, so that a note can hold what a file calls its tokens."""
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
