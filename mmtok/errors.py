"""Every error class of mmtok. Each message says what was got, what was expected and what to do."""

from __future__ import annotations


class MmtokError(Exception):
    """Base of every error that mmtok raises on purpose. The command line turns it into exit code 2."""


class ConfigError(MmtokError, ValueError):
    """A configuration has an unknown key, a wrong type or an impossible value."""


class MediaError(MmtokError, ValueError):
    """A media file or array cannot be read, is of the wrong kind, or holds values out of range."""


class CheckpointError(MmtokError, ValueError):
    """A checkpoint directory is missing, damaged, or not what its metadata says."""


class VocabularyError(MmtokError, ValueError):
    """Blocks, codes or ids do not fit the vocabulary registry."""


class VocabularyMismatchError(VocabularyError):
    """Two things that must share one vocabulary carry different fingerprints."""


class LayoutError(MmtokError, ValueError):
    """A token stream does not follow the codebook layout it is said to have."""


class SequenceError(MmtokError, ValueError):
    """An id sequence breaks the grammar.

    Attributes:
        position: index of the first offending id; the length of the sequence if it ends too early.
        got: description of the offending id.
        expected: description of what the grammar allows there.
    """

    def __init__(self, position: int, got: str, expected: str) -> None:
        self.position = position
        self.got = got
        self.expected = expected
        super().__init__(f"position {position}: got {got}, expected {expected}")


class DataError(MmtokError, ValueError):
    """A corpus, manifest or folder cannot be used as it stands."""
