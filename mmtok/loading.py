"""``mmtok.load`` and the places where vocabularies and tokenizers are looked for.

``load``            -- a tokenizer from a directory or by the name of a bundled one
``read_vocabulary`` -- a vocabulary, and the directory that it lies in
``find_tokenizer``  -- where a tokenizer that a vocabulary names is
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from mmtok.audio.codec import SpectralCodec
from mmtok.audio.encodec import Encodec
from mmtok.audio.published import DAC, SNAC, Mimi, PublishedCodec, XCodec
from mmtok.checkpoints import META, bundled_directory, read_meta, resolve
from mmtok.errors import CheckpointError, VocabularyError
from mmtok.image.published import VQGAN, Emu3VQ, PublishedTokenizer, VQModel
from mmtok.image.vqvae import ImageVQVAE
from mmtok.registry import VOCAB_FILE, VocabularyRegistry
from mmtok.text import ByteLevelBPE, ByteLevelUnigram, TextTokenizer
from mmtok.text.published import SentencePieceText

_TEXT = (ByteLevelBPE, ByteLevelUnigram, SentencePieceText)
_IMAGE = (ImageVQVAE, VQGAN, Emu3VQ, VQModel)
_AUDIO = (SpectralCodec, Encodec, DAC, Mimi, SNAC, XCodec)
TOKENIZERS = {c.kind: c for c in (*_TEXT, *_IMAGE, *_AUDIO)}


@runtime_checkable
class Tokenizer(Protocol):
    """What every tokenizer has; each class says which shapes its encode and decode take."""

    kind: str
    modality: str

    @property
    def fingerprint(self) -> str: ...

    @property
    def codebook_sizes(self) -> tuple[int, ...]: ...

    def save(self, path: str | Path) -> None: ...


def load(
    path: str | Path,
) -> TextTokenizer | ImageVQVAE | PublishedTokenizer | SpectralCodec | Encodec | PublishedCodec:
    """Load a tokenizer; its mmtok.json says which class it is.

    Args:
        path: a checkpoint directory, or the name of a bundled one (``image-64-f8``).

    Raises:
        CheckpointError: missing, damaged, or of a kind that is no tokenizer.
    """
    meta = read_meta(path)
    if meta["kind"] not in TOKENIZERS:
        raise CheckpointError(f"{path} holds a {meta['kind']!r}; tokenizers are: {', '.join(TOKENIZERS)}")
    return TOKENIZERS[meta["kind"]].load(path)


def read_vocabulary(path: str | Path) -> tuple[VocabularyRegistry, Path]:
    """A vocabulary and the directory that it lies in; neither tokenizers nor weights are read.

    Args:
        path: a vocab.json, a directory with one, or the name of a bundled model.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        VocabularyError: it is damaged; the file is named.
    """
    place = Path(path)
    try:
        file = place if place.is_file() else (place if (place / VOCAB_FILE).is_file() else resolve(place)) / VOCAB_FILE
        if not file.is_file():
            raise CheckpointError(f"{place} has no {VOCAB_FILE}")
    except CheckpointError as error:
        have = sorted(p.parent.name for p in bundled_directory().glob(f"*/{VOCAB_FILE}"))
        raise CheckpointError(
            f"no vocabulary at {str(path)!r}: expected a {VOCAB_FILE}, which mmtok vocab create writes, a directory "
            f"with one, or one of the bundled: {', '.join(have)}"
        ) from error
    try:
        return VocabularyRegistry.from_json(file.read_text(encoding="utf-8")), file.parent
    except VocabularyError as error:
        raise VocabularyError(f"{file}: {error}; put the file back, or make it with mmtok vocab create") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{file} cannot be read as a vocabulary ({reason}); expected a {VOCAB_FILE}") from error


def find_tokenizer(name: str, directory: Path) -> Path:
    """Where the tokenizer of this name is for a vocabulary in ``directory``: in it, beside it, or among the bundled.

    Raises:
        CheckpointError: in none of them.
    """
    near = (directory / name, directory.resolve().parent / name, bundled_directory() / name)
    found = next((p for p in near if (p / META).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"the vocabulary in {directory} needs the tokenizer {name!r}, which is neither there, nor beside it in "
            f"{near[1].parent}, nor bundled; put its checkpoint directory there"
        )
    return found
