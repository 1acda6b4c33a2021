"""Tokenizers that others trained and published, from local files, behind the protocol of mmtok's own.

``load`` reads a published file; ``save`` of what it returns writes a checkpoint of mmtok's, which ``mmtok.load`` reads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmtok.errors import CheckpointError
from mmtok.image.published.base import PublishedTokenizer as PublishedTokenizer
from mmtok.image.published.emu3 import Emu3VQ as Emu3VQ
from mmtok.image.published.hub import import_diffusers as import_diffusers
from mmtok.image.published.hub import import_transformers as import_transformers
from mmtok.image.published.importers import import_chameleon as import_chameleon
from mmtok.image.published.importers import import_cosmos as import_cosmos
from mmtok.image.published.importers import import_llamagen as import_llamagen
from mmtok.image.published.importers import import_taming as import_taming
from mmtok.image.published.vqgan import VQGAN as VQGAN
from mmtok.image.published.vqmodel import VQModel as VQModel

SYSTEMS: dict[str, Callable[[str | Path], PublishedTokenizer]] = {
    "taming": import_taming,
    "chameleon": import_chameleon,
    "llamagen": import_llamagen,
    "cosmos": import_cosmos,
    "transformers": import_transformers,
    "diffusers": import_diffusers,
}


def load(system: str, path: str | Path) -> PublishedTokenizer:
    """A published tokenizer from its own file or directory.

    Args:
        system: a name in ``SYSTEMS``; its importer says which file it takes.
        path: a local file or directory.

    Raises:
        CheckpointError: no such system, or what the importer raises.
    """
    if system not in SYSTEMS:
        raise CheckpointError(f"no published system {system!r}; mmtok reads: {', '.join(SYSTEMS)}")
    return SYSTEMS[system](path)
