"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pytest
import torch

# The models of the tests are too small to share among threads, and sums in one thread are the same on every machine.
torch.set_num_threads(1)


@pytest.fixture
def cloud() -> Iterator[fsspec.AbstractFileSystem]:
    """A file system in memory, as an object store is one."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]
