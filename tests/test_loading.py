"""Where vocabularies and the tokenizers that they name are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmtok.checkpoints import bundled_directory
from mmtok.errors import CheckpointError, VocabularyError
from mmtok.image import ImageVQVAE, ImageVQVAEConfig
from mmtok.loading import find_tokenizer, read_vocabulary
from mmtok.multimodal import MultimodalTokenizer, spec_of
from mmtok.registry import VocabularyRegistry
from mmtok.text import ByteLevelBPE


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A vocabulary of a picture tokenizer that lies beside it and a bundled text tokenizer."""
    torch.manual_seed(0)
    pictures = ImageVQVAE(ImageVQVAEConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=16))
    pictures.save(tmp_path / "pictures")
    text = ByteLevelBPE.load("text-4k")
    (tmp_path / "home").mkdir()
    registry = VocabularyRegistry.create([spec_of("pictures", pictures), spec_of("text-4k", text)])
    (tmp_path / "home" / "vocab.json").write_text(registry.to_json())
    return tmp_path / "home"


def test_nothing_depends_on_the_current_directory(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    for name in ("pictures", "text-4k"):  # of the right names, but not those of the vocabulary
        ByteLevelBPE.train(["a cow"], 260).save(here / name)
    monkeypatch.chdir(here)
    mm = MultimodalTokenizer.load(home)
    assert find_tokenizer("text-4k", home) == bundled_directory() / "text-4k"
    (home.parent / "pictures").rename(home / "pictures")
    assert MultimodalTokenizer.load(home / "vocab.json").registry == mm.registry
    (home / "pictures").rename(home.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=r"home needs the tokenizer 'pictures', which is neither there, nor besi"):
        MultimodalTokenizer.load(home)


def test_beside_the_current_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    assert MultimodalTokenizer.load(".").registry == MultimodalTokenizer.load("vocab.json").registry


def test_vocabularies(home: Path, tmp_path: Path) -> None:
    registry, directory = read_vocabulary(home)
    assert directory == home
    assert read_vocabulary(home / "vocab.json") == (registry, home)
    assert read_vocabulary("any-to-any")[1] == bundled_directory() / "any-to-any"
    for missing in (tmp_path, tmp_path / "nowhere", "text-4k"):
        with pytest.raises(CheckpointError, match=r"no vocabulary at .* or one of the bundled: any-to-any$"):
            read_vocabulary(missing)
    (home / "vocab.json").write_text("{")
    with pytest.raises(VocabularyError, match=r"vocab\.json: not a vocabulary"):
        MultimodalTokenizer.load(home)
