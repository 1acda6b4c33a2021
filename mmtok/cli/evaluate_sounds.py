"""What ``mmtok evaluate`` does for audio tokenizers: the report beside Opus, its spectrograms, samples and tables."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtok import media
from mmtok.audio.tokenizer import AudioTokenizer
from mmtok.cli.tables import print_table
from mmtok.errors import ConfigError
from mmtok.evaluation import opus
from mmtok.evaluation.plots import SPECTROGRAM, best_median_worst, contact_sheet, rate_fidelity, spectrogram
from mmtok.evaluation.sounds import AXIS, reconstruct, sound_report
from mmtok.training.corpus import Item

EACH = 2  # best, median and worst sounds


def evaluate_sounds(
    tokenizers: Mapping[str, AudioTokenizer], chosen: list[Item], peers: list[str] | None, out: Path
) -> tuple[dict[str, Any], bytes | None]:
    """Measure, and write spectrograms.png and samples/.

    Args:
        tokenizers: by the names that the report gives them.
        chosen: the sounds' files.
        peers: opus, or nothing; None for Opus where it is installed.
        out: the directory.

    Returns:
        The report, and the PNG of the rates, None without matplotlib.

    Raises:
        ConfigError: another peer, or Opus cannot be measured here.
    """
    other = [name for name in peers or () if name.strip().lower() != "opus"]
    if other:
        raise ConfigError(f"got the peer {other[0]!r}, expected opus or none for audio tokenizers")
    if peers:
        opus.check_available()
    elif peers is None and not opus.available():
        print("no Opus: that needs PyAV with libopus; pip install 'mmtok[evaluation]'", file=sys.stderr)
    report, sets, fidelity = sound_report(tokenizers, chosen, bool(peers) or (peers is None and opus.available()))
    name, recordings = next(iter(sets.items()))
    # Sounds without an STOI, such as short ones, are not ranked; where none has one, the spectra rank them.
    defined = [i for i, s in enumerate(fidelity[name]) if math.isfinite(s.stoi)]
    shown = defined or list(range(len(recordings)))
    scores = {
        label: [s[i].stoi if defined else -s[i].log_mel_distance_db for i in shown] for label, s in fidelity.items()
    }
    sheet = contact_sheet(
        scores,
        [recordings.names[i] for i in shown],
        lambda at: spectrogram(recordings[shown[at]], recordings.sample_rate),
        lambda label, at: spectrogram(reconstruct(tokenizers[label], sets[label][shown[at]]), sets[label].sample_rate),
        SPECTROGRAM,
        EACH,
        "STOI {:.3f}" if defined else "log-mel {:.2f} dB",
    )
    media.write_image(out / "spectrograms.png", sheet)
    for group, members in best_median_worst(scores[name], EACH):
        for number, at in enumerate(members, 1):
            stem = out / "samples" / f"{group}-{number}"
            media.write_audio(f"{stem}-original.wav", recordings[shown[at]], recordings.sample_rate)
            for label, tokenizer in tokenizers.items():
                back = reconstruct(tokenizer, sets[label][shown[at]])
                media.write_audio(f"{stem}-{_as_file(label)}.wav", back, tokenizer.sample_rate)
    report["files"] = {"spectrograms": str(out / "spectrograms.png"), "samples": str(out / "samples")}
    return report, rate_fidelity(report)


def show_figures(report: dict[str, Any]) -> None:
    """Print the figures of each tokenizer by number of levels and by kind of sound, and of each level."""
    print(f"{report['sounds']} sounds, {report['seconds']:g} seconds, {len(report['unreadable'])} unreadable\n")
    header = ("tokenizer", "sounds", "levels", "kb/s", "adaptive", "STOI", "PESQ-WB", "log-mel dB", "STFT distance")
    print_table(header, (_row(*part) for part in _parts(report)))
    print()
    print_table(
        ("tokenizer", "level", "codes", "used", "perplexity", "bits/token", "adaptive", "kept", "near ties"),
        (
            (
                name,
                number,
                level["codebook_size"],
                f"{level['usage']:.1%}",
                level["perplexity"],
                level["entropy_bits"],
                level["adaptive_bits"],
                f"{level['codes_kept']:.1%}",
                "-" if level["near_ties"] is None else f"{level['near_ties']:.3%}",
            )
            for name, f in report["tokenizers"].items()
            for number, level in enumerate(f["levels"])
        ),
    )
    print()
    print_table(
        ("tokenizer", "codes kept", "encode, seconds a second", "decode"),
        (
            (name, f"{f['codes_kept']:.1%}", speed["encode_real_time_factor"], speed["decode_real_time_factor"])
            for name, f in report["tokenizers"].items()
            for speed in (f["speed"],)
        ),
    )
    for note in dict.fromkeys(note for f in report["tokenizers"].values() for note in f["notes"]):
        print(note)


def show_peers(report: dict[str, Any]) -> None:
    """Print what Opus reaches at the nominal bits of each tokenizer, and the bits that it needs for the same."""
    if not report["peers"]:
        return
    print("\nOpus at the same kb/s, and the kb/s that it needs for the tokenizer's STOI and PESQ-WB")
    print_table(
        ("tokenizer", "sounds", "levels", "kb/s", "STOI", "Opus", "PESQ-WB", "Opus", "for STOI", "for PESQ"),
        (
            (
                name,
                source,
                p["levels"],
                f"{p[AXIS]:.3f}",
                _or_dash(p["stoi"], 4),
                _equal(p["opus"]["at_equal_bits"][AXIS], "stoi", 4),
                _or_dash(p["pesq_wb"], 3),
                _equal(p["opus"]["at_equal_bits"][AXIS], "pesq_wb", 3),
                _needs(p["opus"]["needs"].get("stoi")),
                _needs(p["opus"]["needs"].get("pesq_wb")),
            )
            for name, source, p in _parts(report)
        ),
    )


def _parts(report: dict[str, Any]) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """(tokenizer, kind of sound, prefix): of all sounds every prefix, of each kind that with all levels."""
    for name, figures in report["tokenizers"].items():
        for prefix in figures["prefixes"]:
            yield name, "all", prefix
        for source, part in figures["by_source"].items():
            yield name, source, part["prefixes"][-1]


def _row(name: str, source: str, prefix: dict[str, Any]) -> Sequence[object]:
    return (
        name,
        source,
        prefix["levels"],
        f"{prefix[AXIS]:.3f}",
        _or_dash(prefix.get("adaptive_kilobits_per_second"), 3),
        _or_dash(prefix["stoi"], 4),
        _or_dash(prefix["pesq_wb"], 3),
        _or_dash(prefix["log_mel_distance_db"], 2),
        _or_dash(prefix["stft_distance"], 3),
    )


def _equal(figures: dict[str, float], key: str, digits: int) -> str:
    for limit in ("cannot_go_under", "cannot_go_over"):
        if limit in figures:
            return f"{limit.replace('_', ' ')} {figures[limit]:.2f}"
    return _or_dash(figures.get(key), digits)


def _needs(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    ((key, rate),) = found.items()
    return f"{rate:.2f}" if key == "rate" else f"{key.replace('_', ' ')} {rate:.2f}"


def _or_dash(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _as_file(label: str) -> str:
    """A name that can be part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in label)
