"""Checkpoint directories: config.json + model.safetensors + mmtok.json, written atomically, loaded strictly.

``mmtok.json`` names the kind of the model and the sha256 of every other file, so that nothing is guessed
and damage is found on load. Weights are safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from mmtok.errors import CheckpointError

FORMAT = 1
META = "mmtok.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(kind: str, config_json: str, files: Mapping[str, bytes]) -> str:
    """What the codes mean: sha256 over the kind, the config and the bytes of the files, in order of name."""
    h = hashlib.sha256()
    for part in (kind.encode(), config_json.encode(), *(x for n in sorted(files) for x in (n.encode(), files[n]))):
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.hexdigest()


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary sibling directory that takes the place of ``path`` if the block succeeds, else vanishes.

    Raises:
        CheckpointError: a file is there.
    """
    target = Path(path).resolve()  # through links, and "." has a parent
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{path} is a file; expected a directory, or a name that is free")
    with _temporary_names_as(path, target):
        _make_parent(path, target)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield work
            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
                os.replace(target, old / "x")
                try:
                    os.replace(work, target)
                except BaseException:
                    os.replace(old / "x", target)
                    old.rmdir()
                    raise
                shutil.rmtree(old)
            else:
                os.replace(work, target)
            os.chmod(target, 0o755)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write a temporary sibling, flush it to the disk, then rename it over ``path``, or what that links to.

    Raises:
        CheckpointError: a directory is there, or a device, which the renaming would replace.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        kind = "directory" if target.is_dir() else "device"
        raise CheckpointError(f"{path} is a {kind}; expected a file, or a name that is free")
    with _temporary_names_as(path, target):
        _make_parent(path, target)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(name, 0o644)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _make_parent(path: str | Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(errno.ENOTDIR, "a part of the path is a file, not a directory", str(path)) from error


@contextmanager
def _temporary_names_as(path: str | Path, target: Path) -> Iterator[None]:
    """Let errors of the system name ``path``, not its temporary siblings, nor nothing, as that of a full disk does."""
    try:
        yield
    except OSError as error:
        name = str(error.filename or "")
        if error.errno is None or (name and str(target.parent / f".{target.name}.") not in name):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def save_checkpoint(
    path: str | Path, kind: str, config_json: str, files: Mapping[str, bytes], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint directory. What else is there already (a model card) is kept.

    Args:
        path: the directory.
        kind: the name under which the class is known to ``mmtok.load``.
        config_json: the canonical JSON of the config.
        files: name -> bytes, beside config.json and mmtok.json.
        extra: more JSON entries for mmtok.json.
    """
    target = Path(path)
    contents = {CONFIG: config_json.encode(), **files}
    meta = {
        "format": FORMAT,
        "kind": kind,
        "sha256": {n: hashlib.sha256(contents[n]).hexdigest() for n in sorted(contents)},
        **(extra or {}),
    }
    with atomic_directory(target) as work:
        if target.is_dir():
            for old in target.iterdir():
                if old.is_dir() and not old.is_symlink():
                    shutil.copytree(old, work / old.name, symlinks=True)
                elif old.name not in contents and old.name != META:
                    shutil.copy2(old, work / old.name, follow_symlinks=False)
        for name, data in contents.items():
            (work / name).write_bytes(data)
        (work / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def resolve(path: str | Path) -> Path:
    """A directory, or the name of a bundled checkpoint (``image-64-f8`` or ``pretrained/image-64-f8``)."""
    p = Path(path)
    if (p / META).is_file():
        return p
    bundled = bundled_directory()
    name = p.name if p.parent in (Path("."), Path("pretrained")) else ""
    if name and (bundled / name / META).is_file():
        return bundled / name
    have = sorted(d.parent.name for d in bundled.glob(f"*/{META}"))
    raise CheckpointError(
        f"no checkpoint at {str(path)!r}: expected a directory with {META}, or one of the bundled: {', '.join(have)}"
    )


def bundled_directory() -> Path:
    """Where the pretrained checkpoints lie: inside the installed package, or beside it in a source tree."""
    inside = Path(str(resources.files("mmtok"))) / "pretrained"
    return inside if inside.is_dir() else Path(__file__).resolve().parent.parent / "pretrained"


def read_meta(path: str | Path) -> dict[str, Any]:
    """mmtok.json of a checkpoint directory or of a bundled checkpoint.

    Raises:
        CheckpointError: missing, damaged or of another format.
    """
    directory = resolve(path)
    try:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
        version = meta["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / META} is damaged ({error}); save or fetch the checkpoint again") from error
    if version != FORMAT:
        raise CheckpointError(f"{directory} has format {version}; this mmtok reads format {FORMAT}")
    kind, files = meta.get("kind"), meta.get("sha256")
    strings = isinstance(kind, str) and isinstance(files, dict) and all(isinstance(x, str) for x in files.values())
    if not strings or CONFIG not in files:
        raise CheckpointError(
            f"{directory / META} is damaged (it must name a kind and the sha256 of each file, {CONFIG} among them); "
            "save or fetch the checkpoint again"
        )
    return meta


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], str, dict[str, bytes], Path]:
    """Read and check a checkpoint directory.

    Returns:
        (mmtok.json, config.json's text, name -> bytes of the other files, the directory).

    Raises:
        CheckpointError: missing, of another format, or a file whose sha256 is not the recorded one.
    """
    directory = resolve(path)
    meta = read_meta(path)
    contents: dict[str, bytes] = {}
    for name, digest in meta["sha256"].items():
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file} is missing; save or fetch the checkpoint again")
        contents[name] = file.read_bytes()
        got = hashlib.sha256(contents[name]).hexdigest()
        if got != digest:
            raise CheckpointError(
                f"{file}: sha256 is {got[:12]}..., {META} says {digest[:12]}...; the file is damaged or was edited: "
                "save or fetch the checkpoint again"
            )
    config = contents.pop(CONFIG).decode()
    return meta, config, contents, directory


def read_model(path: str | Path, kind: str) -> tuple[str, dict[str, bytes], dict[str, torch.Tensor], Path]:
    """Read and check a checkpoint directory that holds a model of one kind.

    Returns:
        (config.json's text, name -> bytes of the other files, the tensors of model.safetensors, the directory).

    Raises:
        CheckpointError: as ``read_checkpoint``, another kind, or weights that cannot be read.
    """
    meta, config, files, directory = read_checkpoint(path)
    if meta["kind"] != kind:
        raise CheckpointError(f"{directory} holds a {meta['kind']!r}, expected a {kind!r}")
    try:
        return config, files, load(files[WEIGHTS]), directory
    except (KeyError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: no readable {WEIGHTS} ({error})") from error


def tensors_to_bytes(state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Safetensors bytes of a state dict (contiguous copies, so shared storage is not an issue)."""
    return save({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, dict(metadata or {}))


def load_strict(module: torch.nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Load a state dict; every name and every shape must fit.

    Raises:
        CheckpointError: lists the missing, the unexpected and the misshapen tensors.
    """
    have = module.state_dict()
    missing, unexpected = sorted(set(have) - set(state)), sorted(set(state) - set(have))
    shapes = [
        f"{k}: {tuple(state[k].shape)} for {tuple(have[k].shape)}"
        for k in sorted(set(have) & set(state))
        if state[k].shape != have[k].shape
    ]
    if missing or unexpected or shapes:
        parts = [("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)]
        text = "; ".join(f"{label}: {', '.join(x[:5])}{'...' if len(x) > 5 else ''}" for label, x in parts if x)
        raise CheckpointError(f"{where}: the weights do not fit the model ({text})")
    module.load_state_dict(dict(state))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is not one, or it is cut short.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error})") from error
