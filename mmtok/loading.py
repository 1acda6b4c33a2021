"""``mmtok.load``: a tokenizer or a transformer from a directory or by the name of a bundled one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from mmtok import checkpoints
from mmtok.audio.codec import SpectralCodec
from mmtok.audio.encodec import Encodec
from mmtok.errors import CheckpointError
from mmtok.image.vqvae import ImageVQVAE
from mmtok.text.bpe import ByteLevelBPE

TOKENIZERS = {c.kind: c for c in (ByteLevelBPE, ImageVQVAE, SpectralCodec, Encodec)}


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


def load(path: str | Path) -> ByteLevelBPE | ImageVQVAE | SpectralCodec | Encodec:
    """Load a tokenizer; its mmtok.json says which class it is.

    Args:
        path: a checkpoint directory, or the name of a bundled one (``image-64-f8``).

    Raises:
        CheckpointError: missing, damaged, or of a kind that is no tokenizer.
    """
    meta = checkpoints.read_meta(path)
    if meta["kind"] not in TOKENIZERS:
        raise CheckpointError(f"{path} holds a {meta['kind']!r}; tokenizers are: {', '.join(TOKENIZERS)}")
    return TOKENIZERS[meta["kind"]].load(path)
