"""Figures of audio tokenizers: against plain twins, and for tokenizers that are known to be exact."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import codec_files
import encodec_models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmtok import media
from mmtok.audio.published import SNAC
from mmtok.audio.tokenizer import AudioTokenizer
from mmtok.errors import ConfigError, DataError
from mmtok.evaluation import opus
from mmtok.evaluation.fidelity import Fidelity, compare, notes, summarize
from mmtok.evaluation.metrics import has_pesq, log_mel_distance, pesq_wb, stft_distance, stoi
from mmtok.evaluation.plots import SPECTROGRAM, rate_fidelity, spectrogram
from mmtok.evaluation.recordings import Recordings
from mmtok.evaluation.sets import choose
from mmtok.evaluation.sounds import measure, prefixes, reconstruct, sound_report
from mmtok.quantizers import VectorQuantizer

RATE = 16_000
SECONDS = (0.7, 0.3, 1.1, 0.62)
FEW = [opus.Setting("voip", 20, "off", 3_000), opus.Setting("audio", 60, "on", 12_000)]


def voice(seconds: float, seed: int) -> np.ndarray:
    """float32 [1, T] at 16 kHz: harmonics of a gliding pitch in syllables, with a little noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 2 * t + seed)) / RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 20)) * (0.1 + np.abs(np.sin(2 * np.pi * 2.5 * t)))
    return (0.1 * (tone + 0.05 * rng.normal(size=len(t))))[None].astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sounds of two kinds, and a manifest that names the kinds."""
    home = tmp_path_factory.mktemp("sounds")
    lines = []
    for number, seconds in enumerate(SECONDS):
        media.write_audio(home / f"{number}.wav", voice(seconds, number), RATE)
        segment = {"type": "audio", "path": f"{number}.wav"}
        kind = "speech" if number % 2 else "music"
        lines.append({"id": str(number), "split": "val", "source": kind, "segments": [segment]})
    (home / "sounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


@pytest.fixture(scope="module")
def recordings(folder: Path) -> Recordings:
    return Recordings(choose(folder / "sounds.jsonl", "audio")[0], RATE)


class Exact(AudioTokenizer):
    """Loses nothing: sixteen bits of every sample, the high eight in the first level, the low eight in the second."""

    fingerprint = "exact"
    sample_rate = RATE
    hop = 1
    codebook_sizes = (256, 256)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def to_codes(self, samples: Tensor, levels: int) -> Tensor:
        whole = (samples * 32768).round().long().clamp(-32768, 32767) + 32768
        return torch.cat([whole // 256, whole % 256], 1)[:, :levels]

    def to_samples(self, codes: Tensor) -> Tensor:
        low = codes[:, 1:] if codes.shape[1] == 2 else torch.full_like(codes, 128)
        return (codes[:, :1] * 256 + low - 32768).float() / 32768


class Steps(Exact):
    """Sixteen steps of the means of four samples, always a code higher than what it decodes to; it tells near ties."""

    fingerprint = "steps"
    hop = 4
    codebook_sizes = (17,)

    def to_codes(self, samples: Tensor, levels: int) -> Tensor:
        whole = nn.functional.pad(samples, (0, -samples.shape[-1] % 4)).unflatten(-1, (-1, 4)).mean(-1)
        return ((whole + 1) * 7.5).round().long().clamp(0, 15) + 1

    def to_samples(self, codes: Tensor) -> Tensor:
        return ((codes - 2).clamp_min(0) / 7.5 - 1).float().repeat_interleave(4, -1)

    def near_ties(self, samples: Tensor, within: float) -> Tensor:
        return self.encode(samples) == 8


class Picky(Exact):
    """Works with all of its levels only."""

    codebook_sizes = (256,) * 6

    def check_levels(self, levels: int) -> None:
        if levels not in (3, 6):
            raise ConfigError(f"got {levels} levels, expected 3 or 6")


# --- fidelity


def test_fidelity_is_that_of_the_metrics() -> None:
    x = voice(1.0, 0)
    y = (x + np.random.default_rng(0).normal(0, 0.01, x.shape)).astype(np.float32)
    a, b = torch.from_numpy(x)[None], torch.from_numpy(y)[None]
    expected = [float(f(a, b, RATE)) for f in (stoi, pesq_wb, log_mel_distance)] + [float(stft_distance(a, b))]
    assert list(compare(x, y, RATE)) == expected


def test_means_are_over_the_sounds_that_have_one() -> None:
    short = compare(voice(0.2, 0), voice(0.2, 1), RATE)
    assert math.isnan(short.stoi)
    assert math.isnan(short.pesq_wb)
    rows = [Fidelity(0.8, 2.0, 3.0, 1.0), Fidelity(0.6, math.nan, 5.0, 2.0), short]
    means = summarize(rows)
    assert (means["stoi"], means["pesq_wb"]) == (0.7, 2.0)
    assert means["log_mel_distance_db"] == pytest.approx((8 + short.log_mel_distance_db) / 3, abs=1e-3)
    assert (means["sounds_with_stoi"], means["sounds_with_pesq"]) == (2, 1)
    assert summarize([short])["stoi"] is None
    assert notes(rows) == [
        "STOI is of 2 of 3 sounds: it needs .4 s that are not silent",
        "PESQ is of 1 of 3 sounds: it needs .25 s in which it finds speech",
    ]
    assert notes(rows[:1]) == []


def test_without_pesq_a_note_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, recordings: Recordings) -> None:
    assert has_pesq()
    monkeypatch.setattr("mmtok.evaluation.fidelity.has_pesq", lambda: False)
    assert math.isnan(compare(voice(1.0, 0), voice(1.0, 0), RATE).pesq_wb)
    figures = measure(Steps(), recordings)[0]
    assert figures["prefixes"][0]["pesq_wb"] is None
    assert any("C compiler" in note and "pip install 'mmtok[evaluation]'" in note for note in figures["notes"])


# --- the set of sounds


def test_sounds_of_folders_and_manifests(folder: Path, tmp_path: Path) -> None:
    own = Recordings(choose(folder, "audio")[0], RATE)
    assert (own.names, own.lengths) == ([f"{i}.wav" for i in range(4)], [round(s * RATE) for s in SECONDS])
    assert own.by_source() == {}, "a folder has one kind"
    assert own.seconds() == pytest.approx(sum(SECONDS))
    assert own.seconds([0, 2]) == pytest.approx(1.8)
    other = Recordings(choose(folder / "sounds.jsonl", "audio")[0], 8_000, channels=2)
    assert other.by_source() == {"music": [0, 2], "speech": [1, 3]}
    assert other[1].shape == (2, round(0.3 * 8_000))
    assert [x.shape for x in other[1:3]] == [x.shape for x in (other[1], other[2])]
    assert np.array_equal(*other[0])
    (tmp_path / "a.wav").write_bytes((folder / "0.wav").read_bytes()[:900])
    (tmp_path / "b.ogg").write_text("no sound")
    with pytest.raises(DataError, match=r"none of 2 sounds can be read; the first: .*a\.wav"):
        Recordings(choose(tmp_path, "audio")[0], RATE)
    media.write_audio(tmp_path / "c.wav", np.concatenate([voice(0.5, 0), 0 * voice(0.5, 0)]), RATE)
    mixed = Recordings(choose(tmp_path, "audio")[0], RATE)
    assert mixed.names == ["c.wav"]
    assert [line.split(":")[0] for line in mixed.unreadable] == [str(tmp_path / "a.wav"), str(tmp_path / "b.ogg")]
    np.testing.assert_allclose(mixed[0], voice(0.5, 0) / 2, atol=1e-4)
    assert Recordings(choose(tmp_path, "audio")[0], RATE, channels=2)[0].shape == (2, 8_000)
    with pytest.raises(DataError, match="got no sounds"):
        Recordings([], RATE)


def test_a_part_of_a_file(folder: Path, tmp_path: Path) -> None:
    segment = {"type": "audio", "path": str(folder / "2.wav"), "start": 0.25, "end": 0.75}
    (tmp_path / "m.jsonl").write_text(json.dumps({"id": "a", "split": "val", "segments": [segment]}) + "\n")
    (part,) = Recordings(choose(tmp_path / "m.jsonl", "audio")[0], RATE)
    np.testing.assert_allclose(part, voice(1.1, 2)[:, 4_000:12_000], atol=1e-4)


# --- tokenizers


def test_an_exact_tokenizer(recordings: Recordings) -> None:
    figures, scores = measure(Exact(), recordings)
    samples = sum(recordings.lengths)
    assert figures["tokens"] == 2 * samples
    one, two = figures["prefixes"]
    assert (one["levels"], one["kilobits_per_second"]) == (1, 128.0)
    assert (two["levels"], two["kilobits_per_second"]) == (2, 256.0)
    assert (two["stoi"], two["log_mel_distance_db"], two["stft_distance"]) == (1.0, 0.0, 0.0)
    assert two["pesq_wb"] == pytest.approx(4.644, abs=1e-3)
    assert one["stoi"] < 1
    assert one["log_mel_distance_db"] > 0
    assert (figures["codes_kept"], figures["bandwidth"]) == (1.0, 256.0)
    whole = np.concatenate([np.rint(x[0] * 32768).astype(int) + 32768 for x in recordings])
    for level, values in zip(figures["levels"], (whole // 256, whole % 256), strict=True):
        counts = np.bincount(values, minlength=256)
        share = counts[counts > 0] / counts.sum()
        assert level["usage"] == pytest.approx((counts > 0).mean(), abs=1e-4)
        assert level["perplexity"] == pytest.approx(2 ** -(share * np.log2(share)).sum(), abs=0.1)
        assert level["codes_kept"] == 1.0
        assert level["near_ties"] is None
    adaptive = sum(level["adaptive_bits"] for level in figures["levels"]) * RATE / 1000
    assert two["adaptive_kilobits_per_second"] == pytest.approx(adaptive, abs=0.02)
    assert any("near ties" in note for note in figures["notes"])
    # Sounds of one kind are those sounds alone.
    assert list(figures["by_source"]) == ["music", "speech"]
    speech = figures["by_source"]["speech"]
    assert (speech["sounds"], speech["seconds"]) == (2, 0.92)
    expected = summarize([scores[1][1], scores[1][3]])
    assert {k: speech["prefixes"][0][k] for k in expected} == expected


def test_a_tokenizer_that_does_not_keep_its_codes(recordings: Recordings) -> None:
    figures, scores = measure(Steps(), recordings)
    frames = sum(-(-n // 4) for n in recordings.lengths)
    (only,) = figures["prefixes"]
    assert figures["tokens"] == frames
    assert only["kilobits_per_second"] == pytest.approx(frames * math.log2(17) / sum(SECONDS) / 1000, abs=1e-4)
    assert figures["codes_kept"] < 0.2
    codes = [Steps().encode(torch.from_numpy(x)[None]) for x in recordings]
    ties = sum(int((c == 8).sum()) for c in codes) / frames
    assert figures["levels"][0]["near_ties"] == pytest.approx(ties, abs=1e-6)
    assert ties > 0
    back = reconstruct(Steps(), recordings[2])
    assert compare(recordings[2], back, RATE) == scores[1][2]
    assert figures["speed"]["threads"] == torch.get_num_threads()
    assert all(value > 0 for value in figures["speed"].values())


def test_which_numbers_of_levels_are_measured() -> None:
    assert prefixes(Steps()) == [1]
    assert prefixes(Exact()) == [1, 2]
    assert prefixes(Picky()) == [6]
    eight = Exact()
    eight.codebook_sizes = (4,) * 8  # type: ignore[misc]
    assert prefixes(eight) == [1, 2, 4, 8]


def test_levels_of_different_rates(tmp_path: Path) -> None:
    codec = SNAC.from_published(codec_files.write(codec_files.snac(), tmp_path / "snac", codec_files.SNAC))
    media.write_audio(tmp_path / "a.wav", voice(1.0, 0), RATE)
    recordings = Recordings(choose(tmp_path, "audio")[0], codec.sample_rate)
    figures = measure(codec, recordings)[0]
    codes = codec.encode(torch.from_numpy(recordings[0])[None])
    assert figures["tokens"] == sum(c.shape[1] for c in codes)
    bits = np.cumsum([5 * c.shape[1] for c in codes]) / recordings.seconds() / 1000
    assert [p["kilobits_per_second"] for p in figures["prefixes"]] == pytest.approx(list(bits[[0, 1, 2]]), abs=1e-4)
    assert [level["entropy_bits"] <= 5 for level in figures["levels"]] == [True] * 3


def test_codes_with_scales(tmp_path: Path) -> None:
    codec = encodec_models.tokenizer(48_000)
    media.write_audio(tmp_path / "a.wav", voice(0.4, 0), RATE)
    recordings = Recordings(choose(tmp_path, "audio")[0], 48_000, 2)
    figures = measure(codec, recordings)[0]
    levels = len(codec.codebook_sizes)
    last = figures["prefixes"][-1]
    assert (last["levels"], figures["tokens"]) == (levels, levels * 60)
    assert last["kilobits_per_second"] == pytest.approx((levels * 600 + 32) / 400, abs=1e-4)
    np.testing.assert_array_equal(
        reconstruct(codec, recordings[0]),
        codec.decode_with_scale(codec.encode_with_scale(torch.from_numpy(recordings[0])[None]))[0].numpy(),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(1, 3), st.sampled_from([1e-3, 0.05, 0.5]))
def test_near_ties_of_residual_levels(seed: int, levels: int, within: float) -> None:
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(6, 3, 8, levels).eval()
    for book in quantizer.books:
        book.entries.normal_()
    z = torch.randn(2, 9, 6)
    got = quantizer.near_ties(z, within)
    assert (got.shape, got.dtype) == ((2, 9, levels), torch.bool)
    rest = quantizer.project_in(z).detach().flatten(0, 1).double().numpy()
    for level, book in enumerate(quantizer.books):
        entries = book.entries.double().numpy()
        distances = np.square(rest[:, None] - entries[None]).sum(-1)
        first, second = np.sort(distances, 1)[:, :2].T
        margin = second / first - 1
        clear = np.abs(margin - within) > 1e-4 * (1 + within)
        assert np.array_equal(got[..., level].flatten().numpy()[clear], (margin <= within)[clear])
        rest = rest - entries[distances.argmin(1)]


# --- the report


def short_sweep(monkeypatch: pytest.MonkeyPatch, tried: Sequence[opus.Setting] = FEW) -> None:
    monkeypatch.setattr(opus, "settings", lambda highest: list(tried))


def test_a_report_beside_opus(folder: Path, recordings: Recordings, monkeypatch: pytest.MonkeyPatch) -> None:
    short_sweep(monkeypatch)
    chosen = choose(folder / "sounds.jsonl", "audio")[0]
    report, sets, fidelity = sound_report({"steps": Steps(), "exact": Exact()}, chosen, opus=True)
    assert (report["sounds"], report["seconds"], report["unreadable"]) == (4, 2.72, [])
    assert sets["steps"] is sets["exact"], "sounds of one form are read and measured once"
    assert [len(f) for f in fidelity.values()] == [4, 4]
    (curve,) = report["peers"]["opus"].values()
    assert list(report["peers"]["opus"]) == ["16000 Hz, mono"]
    rates = [p["kilobits_per_second"] for p in curve]
    steps, exact = (f["prefixes"][-1] for f in report["tokenizers"].values())
    assert max(rates) < steps["kilobits_per_second"] < exact["kilobits_per_second"]
    assert steps["opus"]["at_equal_bits"]["kilobits_per_second"] == {"cannot_go_over": max(rates)}
    assert exact["opus"]["needs"] == {"stoi": {"more_than": max(rates)}, "pesq_wb": {"more_than": max(rates)}}
    music = report["tokenizers"]["steps"]["by_source"]["music"]["prefixes"][0]
    assert set(music["opus"]["at_equal_bits"]) == {"kilobits_per_second"}
    assert music["opus"]["at_equal_bits"]["kilobits_per_second"] != {"cannot_go_over": max(rates)}
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert sound_report({"steps": Steps()}, chosen, opus=False)[0]["peers"] == {}
    plot = rate_fidelity(report)
    assert plot is not None
    assert plot.startswith(b"\x89PNG")


def test_opus_at_exactly_the_bits_of_a_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of 8 kb/s between two settings of Opus: figures lie between theirs."""

    class Slow(Steps):
        fingerprint, hop, codebook_sizes = "slow", 32, (65536,)

        def to_codes(self, samples: Tensor, levels: int) -> Tensor:
            return torch.zeros(1, 1, -(-samples.shape[-1] // 32), dtype=torch.int64)

        def to_samples(self, codes: Tensor) -> Tensor:
            return torch.zeros(1, 1, 32 * codes.shape[-1])

    short_sweep(monkeypatch)
    report = sound_report({"slow": Slow()}, choose(folder, "audio")[0], opus=True)[0]
    (low, high) = report["peers"]["opus"]["16000 Hz, mono"]
    (own,) = report["tokenizers"]["slow"]["prefixes"]
    rate = own["kilobits_per_second"]
    assert low["kilobits_per_second"] < rate < high["kilobits_per_second"]
    share = math.log(rate / low["kilobits_per_second"]) / math.log(
        high["kilobits_per_second"] / low["kilobits_per_second"]
    )
    got = own["opus"]["at_equal_bits"]["kilobits_per_second"]
    for key in ("stoi", "pesq_wb", "log_mel_distance_db", "stft_distance"):
        assert got[key] == pytest.approx((1 - share) * low[key] + share * high[key], abs=1e-3)
    assert own["pesq_wb"] is None, "silence has no PESQ"
    assert own["opus"]["needs"] == {"stoi": {"at_most": low["kilobits_per_second"]}}


def test_a_spectrogram_shows_where_the_sound_is() -> None:
    t = np.arange(RATE) / RATE
    for frequency, half in ((6_000, "top"), (250, "bottom")):
        tone = (0.5 * np.sin(2 * np.pi * frequency * t) * (t > 0.5))[None].astype(np.float32)
        picture = spectrogram(tone, RATE)
        assert (picture.shape, picture.dtype) == ((3, SPECTROGRAM[1], SPECTROGRAM[0]), np.uint8)
        light = picture.astype(int).sum(0)
        left, right = light[:, :150].mean(), light[:, 170:].mean()
        assert right > 2 * left
        top, bottom = light[:80, 200:].mean(), light[80:, 200:].mean()
        assert (top > bottom) == (half == "top")
    assert spectrogram(tone[:, :1], RATE).shape == (3, SPECTROGRAM[1], SPECTROGRAM[0])
    assert len(np.unique(spectrogram(0 * tone, RATE))) <= 3, "silence has one level"
