"""Tensors of the files that PyTorch writes, read as data: no code of theirs runs and no class of theirs is imported.

``read_archive``   -- what a zip archive of ``torch.save`` or ``torch.jit.save`` holds
``module_tensors`` -- the parameters and buffers of a TorchScript module in it, by name

``torch.load(weights_only=True)`` refuses a Lightning checkpoint for the callbacks that lie beside its weights, and a
TorchScript file altogether; ``torch.jit.load`` would run the code in the file. Here every class that the pickle names,
but for tensors and dictionaries, becomes an inert object that remembers its state.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.errors import CheckpointError

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What a pickle that is damaged, or made to harm, can raise.
_UNREADABLE = (
    pickle.UnpicklingError, EOFError, OSError, LookupError, RuntimeError, TypeError, ValueError, AttributeError,
    OverflowError, MemoryError,
)  # fmt: skip


class Inert:
    """What an object of any class becomes: it takes whatever the pickle gives it, and keeps its state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = super().__new__(cls)
        self.state = {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """An element of what was a list."""

    def extend(self, values: Any) -> None:
        """Elements of what was a list."""


def read_archive(path: Path) -> Any:
    """What a zip archive of ``torch.save`` or ``torch.jit.save`` holds: tensors, containers, and ``Inert`` objects.

    Raises:
        CheckpointError: it is damaged, or not such an archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            places = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(places) != 1:
                raise CheckpointError(f"{path} is a zip file without a data.pkl; expected one that torch.save wrote")
            pickled = _stored(archive, places[0])
            _check_operations(pickled)
            return _Reader(io.BytesIO(pickled), archive, places[0].removesuffix("data.pkl")).load()
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, zlib.error) as error:
        raise CheckpointError(
            f"{path} is damaged or no archive of torch.save ({_line(error)}); fetch the file again, or save its state "
            "dict as .safetensors if PyTorch before 1.6 wrote it"
        ) from error
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read as tensors ({_line(error)}); fetch the file again") from error


def module_tensors(module: Any) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript module by name, as its ``state_dict`` would give them."""
    found: dict[str, Tensor] = {}

    def visit(node: Any, prefix: str) -> None:
        if isinstance(node, Inert) and isinstance(node.state, dict):
            for name, value in node.state.items():
                visit(value, f"{prefix}.{name}" if prefix else str(name))
        elif isinstance(node, Tensor):
            found[prefix] = node

    visit(module, "")
    return found


class _Reader(pickle.Unpickler):
    """Unpickles tensors, numbers, text and containers; whatever else is named becomes ``Inert``."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A name in the pickle -> what is done with it; nothing is imported."""
        match module, name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return _tensor
            case "torch._utils", "_rebuild_parameter":
                return _parameter
            case "torch", _ if name in _DTYPES:
                return _DTYPES[name]
        return Inert

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage as a flat tensor; each is read once."""
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"a storage of an unknown type: {pid!r:.80}")
        if key not in self._storages:
            data = bytearray(_stored(self._archive, f"{self._root}data/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        return self._storages[key].view(dtype)


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of an entry, which are as many as it takes in the file."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{name} is compressed")
    return archive.read(name)


def _check_operations(pickled: bytes) -> None:
    """That what the pickle asks for is in proportion to its length, so that reading it cannot exhaust the memory."""
    for operation, argument, _ in pickletools.genops(pickled):
        place = int(str(argument)) if "PUT" in operation.name else 0  # in the memo
        if operation.proto > 4 or not 0 <= place <= len(pickled):
            raise pickle.UnpicklingError(f"{operation.name} {argument!r:.20} is nothing that PyTorch writes")


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any) -> Tensor:
    if math.prod(size) > storage.numel():
        raise ValueError(f"a tensor of {list(size)} out of {storage.numel()} numbers")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _parameter(data: Tensor, *rest: Any) -> Tensor:
    return data


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
