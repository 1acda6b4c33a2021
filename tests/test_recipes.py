"""Every recipe, end to end on a few tiny files, interrupted and resumed; what it leaves can be loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file

import mmtok
from mmtok import media
from mmtok.audio import SpectralCodec
from mmtok.errors import ConfigError, DataError, VocabularyError
from mmtok.evaluation.metrics import has_pesq
from mmtok.image import ImageVQVAE
from mmtok.quantizers import build_quantizer
from mmtok.registry import TokenizerSpec, VocabularyRegistry
from mmtok.text import ByteLevelBPE
from mmtok.training.corpus import split_of
from mmtok.training.inherit import inherit
from mmtok.training.loop import LoopConfig
from mmtok.transformer import Transformer, TransformerConfig

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
RATE = 8000
SCHEDULE = ["steps=3", "batch_size=2", "warmup=1", "eval_every=3", "save_every=2"]
BOTH_STAGES = ["--set", *SCHEDULE, "--then", "steps=3"]
IMAGE = ["channels=8", "encoder_blocks=1", "decoder_blocks=1", "codebook_size=16", "codebook_dim=4", "downsample=16"]
AUDIO = [
    f"sample_rate={RATE}", "hop=400", "window=512", "mels=20", "short_mels=8", "dim=8", "encoder_blocks=1",
    "decoder_blocks=1", "levels=4", "codebook_size=8", "codebook_dim=4",
]  # fmt: skip
MODEL = [
    "hidden_size=16", "intermediate_size=16", "num_hidden_layers=1", "num_attention_heads=2", "num_key_value_heads=1",
    "head_dim=8", "max_position_embeddings=1024",
]  # fmt: skip


def recipe(name: str) -> ModuleType:
    sys.path[:0] = [str(RECIPES)] * (str(RECIPES) not in sys.path)  # as when it is run
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *args: object, die_at: int | Callable[[LoopConfig, int], bool] | None = None) -> ModuleType:
    """Run a recipe as the command line does; with ``die_at`` it is interrupted when that step draws its batch.

    ``die_at`` may also be told the schedule and the step, where there are several schedules.
    """
    module = recipe(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        if die_at is None:
            module.main()
            return module
        rng = module.rng

        def dying(config, step, *example):
            if die_at(config, step) if callable(die_at) else step == die_at:
                raise KeyboardInterrupt
            return rng(config, step, *example)

        patch.setattr(module, "rng", dying)
        with pytest.raises(KeyboardInterrupt):
            module.main()
    return module


def same_run(a: Path, b: Path) -> None:
    same_stage(a, b)
    for name in ("config.json", "model.safetensors", "mmtok.json"):
        assert (a / "model" / name).read_bytes() == (b / "model" / name).read_bytes()


def same_stage(a: Path, b: Path) -> None:
    one, two = load_file(a / "state.safetensors"), load_file(b / "state.safetensors")
    assert one.keys() == two.keys()
    assert not [k for k in one if not torch.equal(one[k], two[k])]
    logs = [[json.loads(x) for x in (r / "metrics.jsonl").read_text().splitlines()] for r in (a, b)]
    for line in (*logs[0], *logs[1]):
        del line["steps_per_s"]
    assert logs[0] == logs[1]
    assert logs[0][-1]["step"] == 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder of pictures, sounds and texts, and a manifest that joins them: three concepts to train on, one held out.

    The folder also holds what real folders hold: files that cannot be read.
    """
    root = tmp_path_factory.mktemp("corpus")
    (root / "things").mkdir()
    r = np.random.default_rng(0)
    concepts = []
    for split, count in (("train", 3), ("val", 1)):
        found = (f"things/{w}{i}" for i in range(1000) for w in ("cow", "hen"))
        concepts += [(split, k) for k in [k for k in found if split_of(k) == split][:count]]
    lines = []
    for i, (split, key) in enumerate(concepts):
        pixels = np.full((40, 30 + 20 * i, 4), 255, np.uint8)
        pixels[5:30, 5:25, :3] = r.integers(0, 256, 3)
        Image.fromarray(pixels).save(root / f"{key}.png")
        t = np.arange(int(RATE * 0.6)) / RATE
        wave = 0.4 * np.sin(2 * np.pi * (200 + 150 * i) * t) + 0.02 * r.standard_normal(len(t))
        soundfile.write(root / f"{key}.joe.wav", wave.astype(np.float32), RATE)
        soundfile.write(root / f"{key}.wav", wave[: RATE // 4].astype(np.float32), RATE)
        (root / f"{key}.txt").write_text(f"A red cow number {i}, with horns. " * 3, encoding="utf-8")
        segments = [
            {"type": "text", "text": f"a red cow {i}"},
            {"type": "text", "text": f"une vache rouge {i}"},
            {"type": "image", "path": f"{key}.png"},
            {"type": "audio", "path": f"{key}.joe.wav", "voice": "joe"},
            {"type": "audio", "path": f"{key}.wav", "voice": "other"},
        ]
        lines.append({"id": key, "split": split, "source": "speech", "segments": segments})
    lines.append({**lines[0], "id": "named", "split": "pair-test"})
    (root / "all.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), encoding="utf-8")
    (root / "broken.png").write_bytes(b"not a picture")
    (root / "broken.wav").write_bytes(b"not a sound")
    return root


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory) -> dict[str, Path]:
    """The runs of the three tokenizer recipes: text and image from the folder, audio from the manifest."""
    out = tmp_path_factory.mktemp("made")
    runs = {m: out / m for m in ("text", "image", "audio")}
    run("text", "--data", corpus, "--out", runs["text"], "--vocab-size", 280)
    run("image", "--data", corpus, "--out", runs["image"], "--set", *SCHEDULE, "--model", *IMAGE)
    run("audio", *audio_arguments(corpus, runs["audio"]))
    return runs


def audio_arguments(corpus: Path, out: Path, *more: str) -> list[object]:
    """Three steps of each stage; ``more`` follows the model's shape."""
    return ["--data", corpus / "all.jsonl", "--out", out, *BOTH_STAGES, "--model", *AUDIO, *more]


def test_text(made, corpus, tmp_path):
    model = mmtok.load(made["text"] / "model")
    assert isinstance(model, ByteLevelBPE)
    assert 256 < model.codebook_sizes[0] <= 280
    text = "A red cow, ünd 🐄"
    assert model.decode(model.encode([text])) == [text]
    run("text", "--data", corpus / "all.jsonl", "--out", tmp_path, "--vocab-size", 260)
    assert mmtok.load(tmp_path / "model").codebook_sizes == (260,)


def test_image(made, corpus, tmp_path):
    model = mmtok.load(made["image"] / "model")
    assert isinstance(model, ImageVQVAE)
    assert model.config.codebook_size == 16
    assert model.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 4, 4)
    (line,) = [json.loads(x) for x in (made["image"] / "metrics.jsonl").read_text().splitlines()]
    wanted = {"val_psnr", "val_ssim", "val_usage", "val_perplexity", "usage", "perplexity", "dead", "loss", "lr"}
    assert wanted <= line.keys()
    grid = media.read_image(made["image"] / "samples" / "000003.png")
    assert grid.shape == (3, 2 * 64, 64), "the one picture of val over its reconstruction"
    arguments = ("--data", corpus, "--out", tmp_path / "again", "--set", *SCHEDULE, "--model", *IMAGE)
    run("image", *arguments, die_at=2)
    assert not (tmp_path / "again" / "model").exists()
    run("image", *arguments)
    same_run(made["image"], tmp_path / "again")


def test_image_in_float32_from_a_manifest(corpus, tmp_path):
    for name, die_at in (("a", None), ("b", 2)):
        arguments = ("--data", corpus / "all.jsonl", "--out", tmp_path / name, "--model", *IMAGE, "--set", *SCHEDULE)
        if die_at:
            run("image", *arguments, "bf16=false", die_at=die_at)
        run("image", *arguments, "bf16=false")
    same_run(tmp_path / "a", tmp_path / "b")


ADVERSARIAL = ["critic=0.1", "critic_start=2", "critic_warmup=1", "gradient=0.1", "l1=0.1", "ms_ssim=0.1"]


def test_image_with_a_critic_and_alpha_and_levels_is_resumed_exactly(corpus, tmp_path):
    for name, die_at in (("a", None), ("b", 2)):
        arguments = ("--data", corpus, "--out", tmp_path / name, "--set", *SCHEDULE, "ema=0.9", "--loss", *ADVERSARIAL)
        arguments += ("--model", *IMAGE, "alpha=true", "levels=2")
        if die_at:
            run("image", *arguments, die_at=die_at)
        run("image", *arguments)
    same_run(tmp_path / "a", tmp_path / "b")
    state = load_file(tmp_path / "a" / "state.safetensors")
    assert [k for k in state if k.startswith("model.critic.")]
    assert [k for k in state if k.startswith("average.codec.")]
    model = mmtok.load(tmp_path / "a" / "model")
    assert model.encode(torch.zeros(1, 4, 40, 64, dtype=torch.uint8)).shape == (1, 3, 4, 2)


@pytest.mark.parametrize("quantizer", [["quantizer=fsq", "fsq_levels=[4,4]"], ["quantizer=lfq"], ["quantizer=simvq"]])
def test_image_with_other_quantizers(corpus, tmp_path, quantizer):
    run("image", "--data", corpus, "--out", tmp_path, "--set", *SCHEDULE, "--model", *IMAGE, *quantizer)
    assert mmtok.load(tmp_path / "model").codebook_sizes == (16,)


def test_killed_image_run_ends_as_the_uninterrupted(made, corpus, tmp_path):
    """A real process, killed by the system after it saved at step 2."""
    arguments = ["--data", str(corpus), "--out", str(tmp_path / "killed"), "--set", *SCHEDULE, "--model", *IMAGE]
    code = f"""
import os, signal, sys
sys.argv = ["image.py", *{arguments!r}]
sys.path.insert(0, {str(RECIPES)!r})
import image
inner = image.rng
def rng(config, step, *example):
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(config, step, *example)
image.rng = rng
image.main()
"""
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, env=one_thread())
    assert died.returncode == -signal.SIGKILL, died.stderr
    subprocess.run(
        [sys.executable, RECIPES / "image.py", *arguments], check=True, capture_output=True, env=one_thread()
    )
    same_run(made["image"], tmp_path / "killed")


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


FSQ = ["quantizer=fsq", "fsq_levels=[4,4]", "codebook_size=16", "levels=1"]


@pytest.mark.parametrize(
    ("modality", "more"), [("image", [*IMAGE, *FSQ]), ("audio", [*AUDIO, *FSQ, "--then", "steps=4"])]
)
def test_two_ranks_train_what_one_does(modality, more, corpus, tmp_path):
    """torchrun for real: the same batches in two shares give the same gradients and counts, up to rounding.

    With fsq, because codebooks are started from the vectors of the first rank alone.
    """
    schedule = ["steps=4", "batch_size=4", "warmup=1", "eval_every=4", "save_every=2", "bf16=false", "ema=0.9"]
    settings = ["--data", str(corpus), "--set", *schedule, "--model", *more]
    for name, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        command = [sys.executable, *launcher, RECIPES / f"{modality}.py", *settings, "--out", tmp_path / name]
        done = subprocess.run(command, capture_output=True, text=True, env=one_thread(), timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / n / "state.safetensors") for n in ("one", "two"))
    # Gradients, not weights: four steps of AdamW move these by next to nothing, whatever the gradients are.
    moments = [k for k in one if k.endswith(".exp_avg") and one[k].norm() > 1e-6]
    assert len(moments) > 10
    for key in moments:
        assert (two[key] - one[key]).norm() < 0.01 * one[key].norm(), key
    logs = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    assert [len(x) for x in logs] == [1, 1], "one rank writes"
    a, b = (json.loads(x[0]) for x in logs)
    assert [b[k] for k in ("usage", "perplexity", "dead")] == [a[k] for k in ("usage", "perplexity", "dead")]


def test_ranks_end_with_the_same_codebook(tmp_path):
    """Two processes with different vectors: entries, counts and sums are equal to the last bit on both."""
    code = """
import sys, torch
from mmtok.codebook import Codebook
from mmtok.quantizers import build_quantizer
from mmtok.training import distributed
distributed.start()
torch.manual_seed(0)
book = Codebook(16, 4, 128).train()
lfq = build_quantizer("lfq", 4, 4, 16).train()
torch.manual_seed(0)
r = torch.Generator().manual_seed(distributed.rank())
for _ in range(30):
    z = torch.randn(1, 64, 4, generator=r) + 10 * distributed.rank()
    book(z)
    loss = lfq(z)[2]
    loss.backward()
    distributed.average_gradients(lfq)
torch.save({**book.state_dict(), "gradient": lfq.project_in.weight.grad}, f"{sys.argv[1]}/{distributed.rank()}.pt")
"""
    (tmp_path / "run.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        tmp_path / "run.py",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread(), timeout=300)
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    # Rank 0 saw vectors around 0 and began there, rank 1 around 10: a code follows those of rank 1 all the way.
    assert float(a["entries"].max()) > 5


def test_sweep(corpus, tmp_path):
    arguments = ["--data", corpus, "--out", tmp_path, "--minutes", 0.001, "--bits", 4, "--only", "vq", "fsq"]
    arguments += ["--set", "batch_size=2", "--model", "channels=8", "encoder_blocks=1", "decoder_blocks=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        module = recipe("sweep_quantizers")
        patch.setattr(module, "PROBE", 2)
        patch.setattr(sys, "argv", ["sweep_quantizers.py", *map(str, arguments)])
        module.main()
        results = json.loads((tmp_path / "sweep.json").read_text())
        assert sorted(r["quantizer"] for r in results) == ["fsq", "vq"]
        assert all(r["bits"] == 4 and r["steps"] >= 2 and r["val_psnr_of_mse"] > 0 for r in results)
        assert (tmp_path / "sweep.png").stat().st_size > 1000
        assert (tmp_path / "sweep.md").read_text().count("| ") > 10
        patch.setattr(sys, "argv", ["sweep_quantizers.py", *map(str, arguments), "--minutes", "1"])
        with pytest.raises(ConfigError, match=r"planned for 0\.001 minutes, not for 1;.*another --out"):
            module.main()
    for bits in (4, 8, 9, 10, 11, 12, 14):
        for name, settings in module.contestants(bits).items():
            values = dict(x.split("=") for x in settings)
            levels = int(values.get("levels", 1))
            assert int(values["codebook_size"]) ** levels == 2**bits, name
            fsq = tuple(json.loads(values.get("fsq_levels", "[]")))
            build_quantizer(values["quantizer"], 8, 8, int(values["codebook_size"]), levels, fsq)


# --- audio


def first_stage(step: int) -> Callable[[LoopConfig, int], bool]:
    return lambda config, now: config.lr == 2e-3 and now == step


def second_stage(step: int) -> Callable[[LoopConfig, int], bool]:
    return lambda config, now: config.lr == 7e-4 and now == step


def test_audio(made, corpus):
    model = mmtok.load(made["audio"] / "model")
    assert isinstance(model, SpectralCodec)
    assert model.encode(torch.zeros(1, 1, RATE)).shape == (1, 4, 20)
    (line,) = [json.loads(x) for x in (made["audio"] / "bare" / "metrics.jsonl").read_text().splitlines()]
    assert {"val_stoi", "val_loss", "loss"} <= line.keys()
    (line,) = [json.loads(x) for x in (made["audio"] / "metrics.jsonl").read_text().splitlines()]
    assert {"val_stoi_1", "val_loss_3", "val_stoi_4", "val_usage", "val_usage_3", "val_perplexity_2"} <= line.keys()
    assert has_pesq() == ("val_pesq_4" in line)
    for stage in (made["audio"], made["audio"] / "bare"):
        names = [f"000003-{i}{rest}" for i in (0, 1) for rest in ("-original.wav", ".png", ".wav")]
        assert sorted(p.name for p in (stage / "samples").iterdir()) == names
        original, rate = soundfile.read(stage / "samples" / "000003-0-original.wav")
        assert rate == RATE
        assert len(original) in (int(RATE * 0.6), RATE // 4)
        assert np.abs(original).max() > 0.1
        picture = media.read_image(stage / "samples" / "000003-0.png")
        columns = picture[:, : picture.shape[1] // 2].reshape(-1, picture.shape[2])
        assert (columns.std(0) > 10).mean() > 0.5, "a tone over the whole width"


def test_audio_starts_its_codebooks_between_the_stages(made):
    """The second stage goes on from the first's averaged weights, with codebooks in their principal components."""
    bare, last = (load_file(made["audio"] / x / "state.safetensors") for x in ("bare", "."))
    codec = {k[12:]: v for k, v in last.items() if k.startswith("model.codec.")}
    assert len(codec) > 20
    before = {k[8:]: v for k, v in bare.items() if k.startswith("average.")}
    for name, value in codec.items():
        if name.startswith(("encoder", "decoder", "synthesis")):
            assert not torch.equal(value, before[name]), name
            torch.testing.assert_close(value, before[name], rtol=0, atol=0.05)
    weight = codec["quantizer.project_in.weight"]
    torch.testing.assert_close(weight @ weight.T, torch.eye(4), rtol=0, atol=0.05)


def test_interrupted_audio_run_ends_as_the_uninterrupted(made, corpus, tmp_path):
    """In the first stage, between the stages where the codebooks start, and in the second."""
    arguments = audio_arguments(corpus, tmp_path / "again")
    for die_at in (first_stage(2), first_stage(3), first_stage(4), second_stage(0), second_stage(2)):
        run("audio", *arguments, die_at=die_at)
        assert not (tmp_path / "again" / "model").exists()
    run("audio", *arguments)
    same_stage(made["audio"] / "bare", tmp_path / "again" / "bare")
    same_run(made["audio"], tmp_path / "again")


CRITICS = ["critic=0.1", "feature=0.2", "critic_start=2", "critic_warmup=1", "stft=0.5", "critic_rows=1"]


@pytest.mark.parametrize(
    ("shape", "more"),
    [
        (["causal=true"], ["--critic-width", "2", "--loss", *CRITICS]),
        (FSQ, []),
    ],
    ids=["causal", "fsq"],
)
def test_audio_with_critics_and_other_quantizers_is_resumed_exactly(corpus, tmp_path, shape, more):
    for name, deaths in (("a", []), ("b", [first_stage(2), second_stage(2)])):
        arguments = audio_arguments(corpus, tmp_path / name, *shape, *more)
        for die_at in deaths:
            run("audio", *arguments, die_at=die_at)
        run("audio", *arguments)
    same_stage(tmp_path / "a" / "bare", tmp_path / "b" / "bare")
    same_run(tmp_path / "a", tmp_path / "b")
    state = load_file(tmp_path / "a" / "state.safetensors")
    assert bool(more) == bool([k for k in state if k.startswith("average.critics.")])
    (line,) = [json.loads(x) for x in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert bool(more) == ("fooled" in line)
    model = mmtok.load(tmp_path / "a" / "model")
    assert model.codebook_sizes == ((16,) if shape == FSQ else (8,) * 4)
    assert model.config.causal == (shape == ["causal=true"])


def test_audio_from_a_folder_of_short_sounds(corpus, tmp_path):
    """Too short for STOI: the log says nothing of it rather than NaN."""
    short = tmp_path / "short"
    (short / "things").mkdir(parents=True)
    for wav in corpus.rglob("*.wav"):
        if ".joe" not in wav.name:
            (short / wav.relative_to(corpus)).write_bytes(wav.read_bytes())
    arguments = ("--set", *SCHEDULE, "steps=1", "--then", "steps=1", "--model", *AUDIO)
    run("audio", "--data", short, "--out", tmp_path / "run", *arguments)
    for stage, key in (("bare", "val_stoi"), (".", "val_stoi_4")):
        text = (tmp_path / "run" / stage / "metrics.jsonl").read_text()
        assert "NaN" not in text
        assert key not in json.loads(text)
    mmtok.load(tmp_path / "run" / "model")


def test_audio_of_another_loss_or_first_stage_is_no_continuation(made, corpus, tmp_path):
    for stage in ("bare", "."):
        (tmp_path / stage).mkdir(exist_ok=True)
        (tmp_path / stage / "state.safetensors").write_bytes((made["audio"] / stage / "state.safetensors").read_bytes())
    arguments = audio_arguments(corpus, tmp_path)
    for change, words in (
        (["--loss", "mel=2"], r"bare.*other settings \(mel: 1.0 there, 2.0 here\)"),
        (["--loss", "commitment=1"], r"other settings \(loss.commitment: 0.2 there, 1.0 here\)"),
        (["--then", "steps=3", "lr=1e-4"], r"another schedule \(lr: 0.0007 there, 0.0001 here\)"),
        (["--set", *SCHEDULE, "steps=4"], r"other settings \(first_steps: 3 there, 4 here\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            run("audio", *arguments, *change)


def test_inherited_rows_by_hand():
    tokenizers = [
        TokenizerSpec("t", "text", (4,), "t"),
        TokenizerSpec("i", "image", (3,), "old", properties={"downsample": 8}),
    ]
    old_registry = VocabularyRegistry.create(tokenizers, max_grid=2)
    registry = VocabularyRegistry.create(
        [tokenizers[0], TokenizerSpec("i", "image", (5,), "new", properties={"downsample": 8})], max_grid=2
    )
    settings = dict(x.split("=") for x in MODEL)
    shapes = [
        TransformerConfig(vocab_size=r.padded_size, **{k: int(v) for k, v in settings.items()})
        for r in (old_registry, registry)
    ]
    old, model = (Transformer(s) for s in shapes)
    start, was = registry.block("image").start, old_registry.block("image").start
    twins = [(np.array([start, start, start + 3]), np.array([was, was + 1, was + 2]))]
    report = inherit(model, registry, old, old_registry, twins)
    assert (report.kept, report.averaged, report.other) == (registry.size - 5, 2, 3)
    table, before = (m.state_dict()["model.embed_tokens.weight"] for m in (model, old))
    torch.testing.assert_close(table[start], before[was : was + 2].mean(0))
    torch.testing.assert_close(table[start + 3], before[was + 2])
    torch.testing.assert_close(table[registry.control("<image>")], before[old_registry.control("<image>")])
    with pytest.raises(VocabularyError, match="got twins of 2 and 1 ids"):
        inherit(model, registry, old, old_registry, [(np.array([start, start]), np.array([was]))])
    with pytest.raises(ConfigError, match="of the shape"):
        inherit(Transformer(dataclasses.replace(shapes[1], num_hidden_layers=2)), registry, old, old_registry, [])


# --- parts


def test_image_of_another_loss_or_data_is_no_continuation(made, corpus, tmp_path):
    state = made["image"] / "state.safetensors"
    (tmp_path / "state.safetensors").write_bytes(state.read_bytes())
    arguments = ["--out", tmp_path, "--set", *SCHEDULE, "--model", *IMAGE]
    with pytest.raises(ConfigError, match=r"other settings \(loss.l1: 0.0 there, 0.5 here\)"):
        run("image", "--data", corpus, *arguments, "--loss", "l1=0.5")
    (tmp_path / "less").mkdir()
    for path in sorted((corpus / "things").glob("*.png"))[:-1]:
        (tmp_path / "less" / path.name).write_bytes(path.read_bytes())
        (tmp_path / "less" / f"x{path.name}").write_bytes(path.read_bytes())
    (tmp_path / "less" / "val").mkdir()
    name = next(f"{i}.png" for i in range(1000) if split_of(f"val/{i}") == "val")
    (tmp_path / "less" / "val" / name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=r"other settings \(data: "):
        run("image", "--data", tmp_path / "less", *arguments)


def test_wrong_arguments(corpus, tmp_path):
    with pytest.raises(ConfigError, match="--size 40, expected a multiple of the model's downsample, 16"):
        run("image", "--data", corpus, "--out", tmp_path, "--size", 40, "--model", *IMAGE)
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        run("image", "--data", corpus, "--out", tmp_path, "--set", "step=3")
    with pytest.raises(DataError, match=r"cannot read the manifest"):
        run("image", "--data", tmp_path / "none.jsonl", "--out", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no audio in split 'train'"):
        run("audio", "--data", tmp_path / "empty", "--out", tmp_path)


def test_prepare_parts(tmp_path):
    module = recipe("prepare")
    (tmp_path / "a.txt").write_text("A  big\tcow.\nfr.utf8=Une vache.\n", encoding="utf-8")
    assert module.name_of(tmp_path / "a.txt") == "A big cow"
    (tmp_path / "b.txt").write_text("")
    assert module.name_of(tmp_path / "b.txt") == ""
    silence, tone = np.zeros(8000, np.float32), np.ones(800, np.float32)
    trim = recipe("speaking").trim
    assert len(trim(np.concatenate([silence, tone, silence]), 8000)) == 800 + 2 * 480 - 1
    assert len(trim(silence, 8000)) == 8000
    assert len(trim(np.zeros(0, np.float32), 8000)) == 0
    assert module.seconds_of(tmp_path / "a.txt") == 0
    soundfile.write(tmp_path / "s.wav", silence, 8000)
    assert module.seconds_of(tmp_path / "s.wav") == 1


def test_nothing_that_is_held_out_is_spoken():
    module = recipe("speaking")
    keys = [f"pair{i}" for i in range(20)]
    heard = next(k for k in keys if module.said_elsewhere(k))
    unheard = next(k for k in keys if not module.said_elsewhere(k))
    named = {
        ("train", "cow"): "A red cow", ("train", "hat"): "A green hat", ("val", "v"): "A purple yak",
        ("test", "t"): "An emu", ("pair-test", heard): "A badger", ("pair-test", unheard): "A mango",
        ("pair-test", f"{heard}2"): "A tall hat",
    }  # fmt: skip
    concepts = [{"id": k, "split": s, "segments": [{"text": name}]} for (s, k), name in named.items()]
    names = {"other/emu": "A small emu", "other/bus": "A yellow bus"}
    phrases = module.phrases_of(concepts, names)
    said = {word for phrase in phrases for word in phrase.split()}
    assert {"cow", "hat", "badger", "the"} <= said
    assert not said & {"emu", "emus", "yak", "yaks", "mango"}
    assert not {module.bare(x) for x in phrases} & {"badger", "mango", "emu", "purple yak", "tall hat"}
    assert sum("badger" in x for x in phrases) >= module.PHRASES - 1, "within phrases, but not as `the badger`"
    assert "the badger" not in phrases
    assert ("yellow bus" in phrases) == (split_of("other/bus") == "train")


def test_prepared_manifest_of_concepts(tmp_path):
    module = recipe("prepare")
    corpora = tmp_path / "corpora"
    stamps, speech = corpora / module.STAMPS / "animals", tmp_path / "speech-en" / "animals"
    stamps.mkdir(parents=True)
    speech.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)).save(stamps / "cow.png")
    (stamps / "cow.txt").write_text("A cow.\nfr.utf8=Une vache.\n", encoding="utf-8")
    (stamps / "hen.txt").write_text("A hen without a picture.\n", encoding="utf-8")
    soundfile.write(speech / "cow.joe.wav", np.zeros(4000, np.float32), 8000)
    soundfile.write(stamps / "cow_desc.ogg", np.zeros(4000, np.float32), 8000, format="OGG")
    names = {"animals/cow": "A cow", "animals/hen": "A hen without a picture"}
    (line,) = module.trimodal_manifest(tmp_path, corpora, names)
    assert line["id"] == "animals/cow"
    assert line["split"] == "train"
    assert [(s["type"], s.get("text"), s.get("voice")) for s in line["segments"]] == [
        ("text", "A cow", None), ("image", None, None), ("image", None, None), ("text", "Une vache", None),
        ("audio", None, "joe"), ("audio", None, "human"),
    ]  # fmt: skip
    assert [s.get("question_only") for s in line["segments"]] == [None, None, True, None, None, None]
    plain, mirrored = (media.read_image(tmp_path / s["path"]) for s in line["segments"][1:3])
    assert np.array_equal(plain[:, :, ::-1], mirrored)
    assert all((tmp_path / s["path"]).is_file() for s in line["segments"] if "path" in s)
    sounds = module.audio_manifest(tmp_path, corpora)
    assert [(s["id"], s["source"], s["seconds"]) for s in sounds] == [
        ("stamps/animals/cow_desc", "speech", 0.5),
        ("speech-en/animals/cow.joe.wav", "synthetic speech", 0.5),
    ]
    (picture,) = module.image_manifest(tmp_path, corpora)
    assert (picture["id"], picture["split"]) == ("tuxpaint-stamps-default/animals/cow", split_of("animals/cow"))
