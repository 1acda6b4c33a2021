"""The few things that must work alike on numpy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmtok.errors import VocabularyError


def integers(values: Any, what: str) -> np.ndarray:
    """A numpy view of numpy, torch or nested-list integers; an empty list is int64.

    Raises:
        VocabularyError: not a rectangular array of integers.
    """
    try:
        array = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise VocabularyError(f"{what}: expected an array of integers ({error})") from error
    if array.size == 0 and isinstance(values, list | tuple):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise VocabularyError(f"{what}: got dtype {array.dtype}, expected integers")
    return array


def like(source: Any, array: np.ndarray) -> Any:
    """``array`` as an int64 torch tensor on ``source``'s device if that is a tensor, else as it is."""
    return source.long().new_tensor(array) if hasattr(source, "new_tensor") else array


def first(wrong: Any) -> int | tuple[int, ...]:
    """Position of the first True: an int in one dimension, else one index a dimension."""
    array = wrong.cpu().numpy() if hasattr(wrong, "cpu") else np.asarray(wrong)
    where = tuple(int(x) for x in np.argwhere(array)[0]) if array.ndim else (0,)
    return where[0] if len(where) == 1 else where


def blank(source: Any, shape: tuple[int, ...], wide: bool = False) -> Any:
    """A new array of ``source``'s kind, device and dtype (int64 if ``wide``), its values not set."""
    if hasattr(source, "new_empty"):
        return (source.long() if wide else source).new_empty(shape)
    return np.empty(shape, np.int64 if wide else source.dtype)
