"""Pictures of any source under one interface: a name for messages and splits, a stamp for caches, and ``read``.

    folder, manifest   -- :mod:`mmtok.training.corpus`
    shards/{000..009}.tar, shards/*.tar, x.tar, or a directory of them
                       -- WebDataset (https://github.com/webdataset/webdataset), read in place by offset
    torchvision:NAME[:ROOT]
                       -- a class of torchvision.datasets; ROOT is ``data`` unless given; nothing is downloaded
    hf:PATH_OR_NAME[:COLUMN]
                       -- Hugging Face ``datasets``: a directory of ``save_to_disk``, or what ``load_dataset`` takes

Splits are the source's own. One that has no ``val`` has ``val`` (and ``test``, where that is missing too) cut from its
``train`` by the hash of the names; one without ``train``, from all of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import inspect
import os
import re
import stat
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from mmtok import media
from mmtok.datasets.sources import tables
from mmtok.datasets.sources.webdataset import Member, find_shards, pictures
from mmtok.errors import DataError, MediaError
from mmtok.sniffing import one_line
from mmtok.training.corpus import items, split_of

# What others call the parts of their data, most usual first.
PARTS = {
    "train": ("train", "trainval", "train-standard", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test",),
}
# What libraries raise on data that is missing or damaged. Nothing broader is caught.
_LIBRARY_ERRORS = (OSError, ValueError, RuntimeError, LookupError, EOFError, ImportError)

Part = Callable[[], list["Picture"]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture, not read yet.

    Attributes:
        name: of the picture in its source: what messages say and splits are made from.
        source: label of where it is from: a manifest's ``source``, else the name of the folder, shard or data set.
        stamp: JSON-able values that change when its bytes change.
        reader: gives its pixels in the mode "RGB" (on white) or "RGBA"; :meth:`read` calls it.
    """

    name: str
    source: str
    stamp: tuple[Any, ...]
    reader: Callable[[str], np.ndarray] = dataclasses.field(repr=False, compare=False)

    def read(self, *, alpha: bool = False) -> np.ndarray:
        """Its pixels; may be called from several threads.

        Args:
            alpha: keep the alpha channel.

        Returns:
            uint8 [3, H, W], transparent pixels on white; with ``alpha`` uint8 [4, H, W], straight (not premultiplied).

        Raises:
            MediaError: it is damaged, or no picture; the message says which one.
        """
        return self.reader("RGBA" if alpha else "RGB")


def open_pictures(source: str | Path, split: str) -> list[Picture]:
    """The pictures of one split of a source, in a fixed order.

    Args:
        source: as above.
        split: ``train``, ``val`` or ``test``, or another that the source itself has.

    Raises:
        DataError: the source is missing or damaged, has no such split, or no picture in it.
    """
    text = str(source)
    scheme, _, rest = text.partition(":")
    if scheme == "torchvision":
        return _in_split(text, _torchvision(text, rest), split)
    if scheme == "hf":
        return _in_split(text, _hugging_face(text, rest), split)
    if shards := find_shards(text):
        return _in_split(text, _webdataset(shards), split)
    return [
        Picture(x.document, x.source, x.stamp, functools.partial(media.read_image, x.path))
        for x in items(Path(source), "image", split)
    ]


def _in_split(source: str, parts: Mapping[str, Part], split: str) -> list[Picture]:
    """The pictures of a split: of the source's own part of that name, or cut by hash from what it trains on."""
    if "train" not in parts:
        parts = {"train": functools.partial(_all_of, tuple(parts.values()))}
    cut = [] if "val" in parts else [x for x in ("val", "test") if x not in parts]
    if split not in parts and split not in cut:
        raise DataError(f"{source}: has no split {split!r}, it has {', '.join([*parts, *cut])}")
    part = "train" if split in cut else split
    found = chosen = parts[part]()
    if part == "train":
        chosen = [x for x in found if (own := split_of(x.name)) == split or (split == "train" and own not in cut)]
    if not chosen:
        raise DataError(f"{source}: no image in split {split!r} ({len(found)} in all of its part {part!r})")
    return chosen


def _all_of(parts: tuple[Part, ...]) -> list[Picture]:
    return [picture for part in parts for picture in part()]


# --- WebDataset -------------------------------------------------------------------------------------------------------


def _webdataset(shards: list[Path]) -> dict[str, Part]:
    """Shards by part: as a word of their names, or of the directories that set them apart, says; else ``train``."""
    top = os.path.commonpath([x.absolute().parent for x in shards])
    parts: dict[str, list[Path]] = {}
    for shard in shards:
        words = re.findall("[a-z]+", str(shard.absolute().relative_to(top)).lower())
        part = next((k for word in words for k, v in PARTS.items() if word in v), "train")
        parts.setdefault(part, []).append(shard)
    return {k: functools.partial(_pictures_of_shards, v) for k, v in parts.items()}


def _pictures_of_shards(shards: list[Path]) -> list[Picture]:
    out = []
    for shard in shards:
        try:
            status = shard.stat()
        except OSError as error:
            raise DataError(f"{shard}: cannot read the shard ({error.strerror})") from error
        stamp = (str(shard), status.st_size, status.st_mtime_ns)
        out += [
            Picture(x.key, shard.stem, (*stamp, x.offset, x.size), functools.partial(_read_member, x))
            for x in pictures(*stamp)
        ]
    return out


def _read_member(member: Member, mode: str) -> np.ndarray:
    return media.decode_image(member.read(), member.label, mode)


# --- torchvision ------------------------------------------------------------------------------------------------------


def _torchvision(source: str, rest: str) -> dict[str, Part]:
    """The parts of a class of torchvision.datasets, as the arguments of its constructor give them."""
    from torchvision import datasets

    name, _, given = rest.partition(":")
    kind = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)):
        near = difflib.get_close_matches(name, datasets.__all__)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise DataError(f"{source}: torchvision.datasets has no class {name!r}{hint}")
    parameters = inspect.signature(kind).parameters
    root = str(Path(given or "data").expanduser())
    fixed = {"root": root, "download": False, "loader": PILImage.open}
    fixed = {k: v for k, v in fixed.items() if k in parameters}
    if given and "root" not in fixed:
        raise DataError(f"{source}: {name} has no root directory; give torchvision:{name}")

    argument = next((x for x in ("train", "split", "image_set") if x in parameters), "")
    needed = [k for k, x in parameters.items() if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD]
    missing = [x for x in needed if x not in (*fixed, argument)]
    variants: dict[str, list[dict[str, Any]]] = {"train": [{}]}
    if argument == "train":
        variants = {"train": [{"train": True}], "test": [{"train": False}]}
    elif argument and not missing:
        tried = {k: [{argument: x} for x in v if _accepts(kind, fixed, {argument: x})] for k, v in PARTS.items()}
        if any(tried.values()):
            variants = {k: v for k, v in tried.items() if v}
        elif argument in needed:
            missing = [argument]
    if missing:
        raise DataError(f"{source}: {name} needs {', '.join(missing)}, which a source cannot give; use another class")
    return {k: functools.partial(_pictures_of_class, source, kind, fixed, k, v) for k, v in variants.items()}


def _accepts(kind: Callable[..., Any], fixed: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """Whether a class knows the name of a split, tried where it finds no data: that costs nothing."""
    with tempfile.TemporaryDirectory() as empty:
        try:
            kind(**fixed | {"root": empty}, **arguments)
        except ValueError:
            return False
        except _LIBRARY_ERRORS:
            return True
    return True


def _pictures_of_class(
    source: str, kind: Callable[..., Any], fixed: dict[str, Any], part: str, variants: list[dict[str, Any]]
) -> list[Picture]:
    from torchvision import __version__ as version
    from torchvision import datasets

    dataset, arguments = _construct(source, kind, fixed, variants)
    names = [f"{part}/{i}" for i in range(len(dataset))]
    if isinstance(dataset, datasets.DatasetFolder):  # the names that the folder has as a source of its own
        names = [Path(x).relative_to(fixed["root"]).with_suffix("").as_posix() for x, _ in dataset.samples]
    name = str(kind.__name__)
    stamp = ("torchvision", version, name, arguments, _tree(Path(fixed["root"])) if "root" in fixed else "")
    lock = threading.Lock()
    return [
        Picture(x, name, (*stamp, i), functools.partial(_read_sample, dataset, i, f"torchvision:{name} {x}", lock))
        for i, x in enumerate(names)
    ]


def _construct(
    source: str, kind: Callable[..., Any], fixed: dict[str, Any], variants: list[dict[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    """A data set, and which of the arguments it took: some classes look for data before the name of the split."""
    failure: Exception = ValueError("no split")
    for arguments in variants:
        try:
            return kind(**fixed, **arguments), arguments
        except _LIBRARY_ERRORS as error:
            failure = error
            if not isinstance(error, ValueError):
                break
    raise DataError(
        f"{source}: cannot be opened ({one_line(failure)}); "
        f"expected in {fixed.get('root')!r} what torchvision's download=True puts there"
    ) from failure


def _read_sample(dataset: Any, index: int, label: str, lock: threading.Lock, mode: str) -> np.ndarray:
    """One picture; classes make no promise to threads, so the lock is held until they have given an image."""
    try:
        with lock:
            sample = dataset[index]
    except (*_LIBRARY_ERRORS, PILImage.DecompressionBombError) as error:
        raise MediaError(f"{label}: cannot be read ({one_line(error)})") from error
    image = sample[0] if isinstance(sample, tuple) else sample
    if not isinstance(image, PILImage.Image):
        raise MediaError(f"{label}: is {type(image).__name__}, expected a Pillow image; use another class")
    return media.convert_image(image, label, mode)


def _tree(root: Path) -> str:
    """sha256 over the names, sizes and times of all files below a directory."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        try:
            status = path.stat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            digest.update(
                f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="replace")
            )
    return digest.hexdigest()


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _hugging_face(source: str, rest: str) -> dict[str, Part]:
    """The splits of a data set of the library ``datasets``."""
    name, column = rest, ""
    if ":" in rest and not Path(rest).exists():
        name, _, column = rest.rpartition(":")
    found = tables.splits(name, source)
    splits = {k: functools.partial(_pictures_of_table, source, name, k, v, column) for k, v in found.items()}
    parts: dict[str, Part] = {k: v for k, v in splits.items() if not any(k in names for names in PARTS.values())}
    for part, names in PARTS.items():
        if own := next((x for x in names if x in splits), None):
            parts[part] = splits[own]
    return parts


def _pictures_of_table(source: str, name: str, split: str, dataset: Any, column: str) -> list[Picture]:
    from datasets import Image

    images = [k for k, v in dataset.features.items() if isinstance(v, Image)]
    if not images or (column and column not in images):
        kinds = ", ".join(f"{k} ({type(v).__name__})" for k, v in dataset.features.items())
        raise DataError(f"{source}: has no column {column or 'of pictures'!r} of type Image, its columns are: {kinds}")
    column = column or images[0]
    # The bytes as they are stored: they are decoded here, with the limits and the background of every other source.
    table = dataset.with_format(None).select_columns([column]).cast_column(column, Image(decode=False))
    fingerprint = dataset._fingerprint  # the library has no public name for it
    return [
        Picture(
            f"{split}/{i}",
            Path(name).name,
            ("datasets", fingerprint, column, i),
            functools.partial(_read_row, table, column, i, f"{source} {split}/{i}"),
        )
        for i in range(len(table))
    ]


def _read_row(table: Any, column: str, index: int, label: str, mode: str) -> np.ndarray:
    try:
        value = table[index][column]
    except _LIBRARY_ERRORS as error:
        raise MediaError(f"{label}: cannot be read ({one_line(error)})") from error
    if value is None:
        raise MediaError(f"{label}: column {column!r} is empty, expected an image")
    if value["bytes"] is None:
        return media.read_image(value["path"], mode)
    return media.decode_image(value["bytes"], label, mode)
