"""Imports go down only: every import statement under mmtok/ is read, and each module is imported."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Bottom to top. A module may import from layers below its own and from its own package; neighbours in one layer not
# from each other. `mmtok` itself, the front door, is above all that it offers.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("arrays", "config"),
    ("archive", "checkpoints"),
    ("published", "weights"),
    ("layouts",),
    ("blocks",),
    ("idmap",),
    ("comparison",),
    ("registry",),
    ("states",),
    ("restrictions",),
    ("automaton",),
    ("grammar",),
    ("listing",),
    ("recovery",),
    ("sequences",),
    ("adapters",),
    ("resampling",),
    ("sniffing", "containers"),
    ("sounds",),
    ("media",),
    ("documents",),
    ("nearest_triton",),
    ("nearest",),
    ("codebook",),
    ("quantizers",),
    ("codec",),
    ("text", "image", "audio"),
    ("loading",),
    ("multimodal",),
    ("export",),
    ("datasets",),
    ("transformer",),
    ("migration",),
    ("training",),
    ("evaluation",),
    ("mmtok",),
    ("cli",),
    ("playground",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def name_of(path: Path) -> str:
    """Dotted module name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((ROOT / "mmtok").rglob("*.py"))}


def imports(path: Path, module: str) -> set[str]:
    """Every module that a file imports, at any depth of its code; of mmtok the file that it comes from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in MODULES else base)
    return found


def layer(module: str) -> str:
    """The name in LAYERS that a module of mmtok belongs to."""
    return module.split(".")[1] if "." in module else "mmtok"


def upward(module: str, targets: set[str]) -> list[str]:
    """The imports of mmtok's modules that a module must not have."""
    mine = layer(module)
    return [
        f"{module} imports {t}"
        for t in sorted(targets)
        if t.split(".")[0] == "mmtok" and layer(t) != mine and RANK[layer(t)] >= RANK[mine]
    ]


def test_every_module_has_a_layer() -> None:
    unknown = sorted({layer(m) for m in MODULES} - set(RANK))
    assert not unknown, f"give {unknown} a place in LAYERS"


def test_the_checker_sees_an_upward_import(tmp_path: Path) -> None:
    lines = [
        "import numpy",
        "def f():",
        " from mmtok import grammar, errors",
        " from mmtok import load",
        " import mmtok.media",
    ]
    (tmp_path / "x.py").write_text("\n".join(lines))
    targets = imports(tmp_path / "x.py", "mmtok.registry")
    assert targets == {"numpy", "mmtok.grammar", "mmtok.errors", "mmtok", "mmtok.media"}
    wrong = [
        "mmtok.registry imports mmtok",
        "mmtok.registry imports mmtok.grammar",
        "mmtok.registry imports mmtok.media",
    ]
    assert upward("mmtok.registry", targets) == wrong
    assert upward("mmtok.image.vqvae", {"mmtok.audio.codec", "mmtok.image"}) == [
        "mmtok.image.vqvae imports mmtok.audio.codec"
    ]
    (tmp_path / "y.py").write_text("from . import codec\nfrom ..errors import MediaError\nfrom .. import media")
    assert imports(tmp_path / "y.py", "mmtok.audio.y") == {"mmtok.audio.codec", "mmtok.errors", "mmtok.media"}


def test_imports_go_down_only() -> None:
    wrong = [line for module, path in MODULES.items() for line in upward(module, imports(path, module))]
    assert not wrong, "\n".join(wrong)


def test_no_imports_go_in_a_circle() -> None:
    edges = {m: imports(path, m) & set(MODULES) - {m} for m, path in MODULES.items()}
    free: set[str] = set()
    while rest := {m for m in edges if m not in free and edges[m] <= free}:
        free |= rest
    assert free == set(edges), f"in a circle, or above one: {sorted(set(edges) - free)}"


def test_mmtok_imports_nothing_that_imports_it() -> None:
    for module, path in MODULES.items():
        taken = {name.split(".")[0] for name in imports(path, module)} & {"recipes", "tests", "benchmarks", "conftest"}
        assert not taken, f"{module} imports {sorted(taken)}"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.name)
def test_recipes_import_what_mmtok_offers(path: Path) -> None:
    targets = imports(path, f"recipes.{path.stem}")
    assert any(t.split(".")[0] == "mmtok" for t in targets)
    missing = sorted(t for t in targets if t.split(".")[0] == "mmtok" and t not in MODULES)
    assert not missing, f"{path.name} imports {missing}, which mmtok has not"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if not m.endswith("__main__")))
def test_every_module_can_be_imported(module: str) -> None:
    if module == "mmtok.nearest_triton":
        pytest.importorskip("triton")  # comes with torch on Linux alone
    importlib.import_module(module)
