"""Fetch the public corpora, make the synthetic English speech, and write one manifest for each recipe.

    python -m pip install -e '.[recipes]'
    python recipes/prepare.py --out data

Leaves, under ``data/``:
    corpora/            the unpacked Debian packages
    stamps-png/         the stamps' SVG drawings as PNG
    stamps-mirrored/    mirror images of those of the trimodal corpus
    speech-en/          the stamps' English names, spoken by a neural voice (piper, joe) and by espeak-ng
    speech-phrases/, speech-questions/  more that is spoken by them
    images.jsonl        clip art, stamps, photographs         -> recipes/image.py
    audio.jsonl         spoken names, sounds, music           -> recipes/audio.py
    text.jsonl          source code, documentation, names, and prose in about a hundred languages -> recipes/text.py
    trimodal.jsonl      picture, names and spoken names of one concept -> recipes/any_to_any.py
    phrases.jsonl       short phrases, spoken                    -> recipes/any_to_any.py
    questions.jsonl     questions about a picture, spoken        -> recipes/any_to_any.py

Every line carries its split, fixed by a hash of the path, so that it is the same on every machine.
Packages that were fetched by hand can be handed over with --debs; on a machine without apt-get that is the way.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import soundfile
from PIL import Image, ImageOps
from rich.progress import track
from speaking import phrases_of, speak_names, speak_phrases, speak_questions

from mmtok.training.corpus import bucket, split_of

MEDIA = ("tuxpaint-stamps-default", "openclipart-png", "plasma-workspace-wallpapers", "sonic-pi-samples")
MANUALS = tuple(
    f"manpages-{x}"
    for x in (
        "cs", "da", "de", "el", "es", "fi", "fr", "hu", "id", "it", "ja", "mk", "nb", "nl", "pl", "pt-br", "ro", "ru",
        "sr", "sv", "tr", "uk", "vi", "zh",
    )
)  # fmt: skip
PACKAGES = (*MEDIA, "mediawiki", "gnome-user-docs", "manpages", *MANUALS)
STAMPS = "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
CLIPART = "openclipart-png/usr/share/openclipart/png"
PHOTOS = "plasma-workspace-wallpapers/usr/share/wallpapers"
SAMPLES = "sonic-pi-samples/usr/share/sonic-pi/samples"
HELP = "gnome-user-docs/usr/share/help"
MESSAGES = "mediawiki/usr/share/mediawiki/languages/i18n"
PARTS = 100  # documents that the messages of one language are dealt to
# Of MediaWiki's languages: those that most of its messages are translated to, and some more scripts.
LANGUAGES = (
    "am", "ar", "as", "az", "ba", "be", "bg", "bn", "bo", "br", "bs", "ca", "ckb", "cs", "cv", "cy", "da", "de", "dv",
    "dz", "el", "en", "eo", "es", "et", "eu", "fa", "fi", "fo", "fr", "fy", "ga", "gd", "gl", "gu", "he", "hi", "hr",
    "hu", "hy", "ia", "id", "ig", "is", "it", "ja", "jv", "ka", "kk-cyrl", "km", "kn", "ko", "ku-latn", "ky", "lb",
    "lo", "lt", "lv", "mg", "mk", "ml", "mn", "mr", "ms", "mt", "my", "nb", "ne", "nl", "nn", "nqo", "oc", "or", "pa",
    "pl", "ps", "pt", "pt-br", "ro", "ru", "sa", "sah", "sd", "si", "sk", "sl", "so", "sq", "sr-ec", "sr-el", "su",
    "sv", "sw", "ta", "te", "tg-cyrl", "th", "ti", "tk", "tl", "tr", "tt-cyrl", "ug-arab", "uk", "ur", "uz", "vi",
    "yi", "yo", "zh-hans", "zh-hant",
)  # fmt: skip
MAX_NAME = 14  # characters of a concept's name in the trimodal corpus: short names of single things


def fetch(out: Path, debs: Path | None) -> Path:
    """Download and unpack the packages that are not there yet; returns the corpora's directory."""
    corpora = out / "corpora"
    for name in PACKAGES:
        if (corpora / name).is_dir():
            continue
        if debs is None:
            if shutil.which("apt-get") is None:
                sys.exit(f"{name}: no apt-get here; fetch its .deb from a Debian mirror and pass --debs DIRECTORY")
            (out / "debs").mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", name], cwd=out / "debs", check=True)
        found = sorted((debs or out / "debs").glob(f"{name}_*.deb"))
        if not found:
            sys.exit(f"{name}: no {name}_*.deb in {debs or out / 'debs'}")
        temporary = corpora / f".{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        subprocess.run(["dpkg", "-x", str(found[-1]), str(temporary)], check=True)
        temporary.rename(corpora / name)
    return corpora


def render_stamps(stamps: Path, out: Path) -> None:
    """Draw the SVG stamps as PNG, 256 pixels wide, on a transparent ground."""
    import resvg_py

    for svg in track(sorted(stamps.rglob("*.svg")), "drawing SVG stamps"):
        target = out / svg.relative_to(stamps).with_suffix(".png")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.write_bytes(bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=256)))
            except ValueError as error:
                print(f"skipped {svg.name}: {error}", file=sys.stderr)


def name_of(txt: Path) -> str:
    """The English name on the first line of a stamp's description, without its final stop."""
    lines = txt.read_text(encoding="utf-8", errors="replace").splitlines()
    return re.sub(r"\s+", " ", lines[0]).strip().rstrip(".") if lines else ""


def pair_test(concept: str, language: str) -> bool:
    """Whether the spoken name of a concept of `train` is held out in a language."""
    return split_of(concept) == "train" and bucket(f"{concept}:{language}") % 10 == 0


def seconds_of(path: Path) -> float:
    """Duration of a sound file; 0 if it cannot be read."""
    try:
        return float(soundfile.info(path).duration)
    except soundfile.LibsndfileError:
        return 0.0


def write(path: Path, lines: list[dict]) -> None:
    """Write a JSONL manifest and say what is in it."""
    path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), encoding="utf-8")
    splits = {s: sum(x["split"] == s for x in lines) for s in ("train", "val", "test", "pair-test")}
    print(f"{path}: {len(lines)} documents ({', '.join(f'{s} {n}' for s, n in splits.items() if n)})")


def image_manifest(out: Path, corpora: Path) -> list[dict]:
    lines = []
    roots = {CLIPART: corpora / CLIPART, STAMPS: corpora / STAMPS, PHOTOS: corpora / PHOTOS}
    for source, root in (*roots.items(), (STAMPS, out / "stamps-png")):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".png", ".jpg") and p.is_file()):
            key = str(path.relative_to(root).with_suffix(""))
            if source == PHOTOS:
                if path.parent.name != "images" or path.is_symlink():
                    continue
                key = key.split("/")[0]  # all sizes of one wallpaper are one picture
            segment = {"type": "image", "path": str(path.relative_to(out))}
            kind = source.split("/")[0]
            lines.append({"id": f"{kind}/{key}", "split": split_of(key), "source": kind, "segments": [segment]})
    return lines


def audio_manifest(out: Path, corpora: Path) -> list[dict]:
    lines = []
    stamps = corpora / STAMPS
    for path in sorted(stamps.rglob("*.ogg")):
        key = str(path.relative_to(stamps).with_suffix(""))
        match = re.fullmatch(r"(.+)_desc(?:_(\w+))?", key)
        concept, language = (match[1], match[2] or "en") if match else (key, "")
        lines.append(_sound(out, path, f"stamps/{key}", concept, language, "speech" if language else "sound"))
    speech = out / "speech-en"
    for path in sorted(speech.rglob("*.wav")):
        concept = str(path.relative_to(speech)).rsplit(".", 2)[0]
        lines.append(_sound(out, path, f"speech-en/{path.relative_to(speech)}", concept, "en", "synthetic speech"))
    for path in sorted((corpora / SAMPLES).glob("*.flac")):
        lines.append(_sound(out, path, f"samples/{path.stem}", path.stem, "", "music"))
    return [x for x in lines if x["seconds"] > 0.1]


def _sound(out: Path, path: Path, identity: str, concept: str, language: str, kind: str) -> dict:
    split = "pair-test" if language and pair_test(concept, language) else split_of(concept)
    segment = {"type": "audio", "path": str(path.relative_to(out))}
    return {
        "id": identity, "split": split, "source": kind, "language": language,
        "seconds": round(seconds_of(path), 3), "segments": [segment],
    }  # fmt: skip


def text_manifest(out: Path, corpora: Path) -> list[dict]:
    """Source code, documentation and names, without a language; manuals, help and messages with theirs."""
    import sysconfig

    lines = []
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sources = [
        (stdlib, sorted(stdlib.glob("*.py"))),
        (Path("/usr/share/doc"), sorted(Path("/usr/share/doc").rglob("copyright"))),
    ]
    sources.append((corpora / STAMPS, sorted((corpora / STAMPS).rglob("*.txt"))))
    for root, paths in sources:
        for path in paths:
            key = str(path.relative_to(root).with_suffix(""))
            text = path.read_text(encoding="utf-8", errors="ignore")
            if root.name == "stamps":  # `xx.utf8=name` lines: keep the names
                text = "\n".join(re.sub(r"^\w+(\.utf8)?=", "", x) for x in text.splitlines())
            if text.strip():
                segment = {"type": "text", "text": text[:50_000]}
                lines.append(
                    {"id": f"{root.name}/{key}", "split": split_of(key), "source": root.name, "segments": [segment]}
                )
    found = [*manuals(corpora), *help_pages(corpora / HELP), *messages(corpora / MESSAGES)]
    for source, key, locale, text in track(found, "writing texts"):
        if text.strip():
            language = re.split("[-_@]", locale)[0]
            segments = [{"type": "text", "text": text[:50_000], "language": language}]
            # One document in all its languages is in one split.
            name = {"id": f"{source}/{key}/{locale}", "split": split_of(key), "source": source, "language": language}
            lines.append({**name, "segments": segments})
    return lines


def manuals(corpora: Path) -> Iterator[tuple[str, str, str, str]]:
    """(source, key, locale, text) of every manual page; the key is man1/ls.1 in all languages."""
    for path in sorted(p for name in ("manpages", *MANUALS) for p in (corpora / name).rglob("man/**/*.gz")):
        if not path.is_symlink():
            try:
                text = plain_manual(gzip.decompress(path.read_bytes()).decode())
            except UnicodeDecodeError:
                continue  # of another encoding
            locale = path.parts[-3] if path.parts[-3] != "man" else "en"
            yield "manuals", f"{path.parent.name}/{path.stem}", locale, text


def plain_manual(troff: str) -> str:
    """The text of a manual page without the marks of troff."""
    lines = []
    for line in troff.splitlines():
        if line[:1] in (".", "'"):
            heading = re.match(r"\.(?:S[HS]|[BI]|[BIR]{2}|IP) +(.+)", line)
            if heading is None:
                continue
            line = heading[1].replace('"', "")
        line = re.sub(r"\\f(?:\(..|\[[^]]*\]|.)|\\s[-+]?\d|\\[&,/|^%:!)]", "", line)
        line = re.sub(r"\\\[u([0-9A-F]{4,6})\]", lambda m: chr(int(m[1], 16)), line)
        line = line.replace(r"\(aq", "'").replace(r"\(bu", "•").replace(r"\(em", "—").replace(r"\(en", "–")
        line = re.sub(r"\\\(..|\\\*\(..|\\\*.|\\\[[^]]*\]", "", line)
        lines.append(re.sub(r"\\([- ~0])", r"\1", line).replace(r"\e", "\\").replace(r"\\", "\\"))
    return "\n".join(lines)


def help_pages(root: Path) -> Iterator[tuple[str, str, str, str]]:
    """(source, key, locale, text) of every page of GNOME's help; paragraphs that are not translated are left out."""
    english = {path.relative_to(root / "C"): paragraphs(path) for path in sorted((root / "C").rglob("*.page"))}
    for locale in sorted(p.name for p in root.iterdir()):
        for relative, source in english.items():
            path = root / locale / relative
            if path.is_file():
                own = [x for x in paragraphs(path) if locale == "C" or x not in source]
                yield "help", str(relative.with_suffix("")), "en" if locale == "C" else locale, "\n\n".join(own)


def paragraphs(page: Path) -> list[str]:
    """Titles and paragraphs of a page in Mallard, each in one line."""
    found = [x for x in ElementTree.parse(page).iter() if x.tag.rpartition("}")[2] in ("title", "p")]
    return [text for x in found if (text := " ".join("".join(x.itertext()).split()))]


def messages(root: Path) -> Iterator[tuple[str, str, str, str]]:
    """(source, key, locale, text) of MediaWiki's messages, dealt to documents by their names, the same everywhere."""
    english = json.loads((root / "en.json").read_text(encoding="utf-8"))
    for locale in LANGUAGES:
        parts: dict[int, list[str]] = {}
        for name, text in json.loads((root / f"{locale}.json").read_text(encoding="utf-8")).items():
            if isinstance(text, str) and (locale == "en" or text != english.get(name)):
                parts.setdefault(bucket(name) % PARTS, []).append(text)
        for part, texts in sorted(parts.items()):
            yield "messages", f"messages/{part}", locale, "\n".join(texts)


def mirrored(picture: Path, concept: str, out: Path) -> Path:
    """The picture's mirror image, which is shown to the model but never drawn by it."""
    target = out / "stamps-mirrored" / f"{concept}.png"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(picture) as image:
            ImageOps.mirror(image.convert("RGBA")).save(target)
    return target


def trimodal_manifest(out: Path, corpora: Path, names: dict[str, str]) -> list[dict]:
    """One line a concept: its name in English and French, its picture, and every English recording of the name."""
    stamps, speech = corpora / STAMPS, out / "speech-en"
    lines: list[dict] = []
    used: set[str] = set()
    for concept, name in names.items():
        picture = next(
            (p for p in (stamps / f"{concept}.png", out / "stamps-png" / f"{concept}.png") if p.is_file()), None
        )
        # Symbols are letters, digits and coins; of several pictures with one name the first is kept.
        if picture is None or concept.startswith("symbols") or not 2 <= len(name) <= MAX_NAME or name.lower() in used:
            continue
        used.add(name.lower())
        # Texts that follow each other would be one text in a dataset: the picture stands between the names.
        segments = [
            {"type": "text", "text": name, "language": "en"},
            {"type": "image", "path": str(picture.relative_to(out))},
            {"type": "image", "path": str(mirrored(picture, concept, out).relative_to(out)), "question_only": True},
        ]
        french = re.search(
            r"^fr(?:\.utf8)?=(.+)$", (stamps / f"{concept}.txt").read_text(encoding="utf-8", errors="replace"), re.M
        )
        if french and 2 <= len(french[1].strip()) <= 2 * MAX_NAME:
            segments.append({"type": "text", "text": french[1].strip().rstrip("."), "language": "fr"})
        for path in sorted(speech.glob(f"{concept}.*.wav")):
            style = path.name.split(".")[-2]
            segments.append({"type": "audio", "path": str(path.relative_to(out)), "voice": style, "language": "en"})
        for suffix, language in (("", "en"), ("_fr", "fr")):
            recorded = stamps / f"{concept}_desc{suffix}.ogg"
            if recorded.is_file() and not (language == "fr" and pair_test(concept, language)):
                path = str(recorded.relative_to(out))
                segments.append({"type": "audio", "path": path, "voice": "human", "language": language})
        split = "pair-test" if pair_test(concept, "en") else split_of(concept)
        lines.append({"id": concept, "split": split, "segments": segments})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--debs", type=Path, help="directory that already holds the .deb files")
    args = parser.parse_args()
    out = args.out.resolve()
    corpora = fetch(out, args.debs)
    stamps = corpora / STAMPS
    render_stamps(stamps, out / "stamps-png")
    names = {str(p.relative_to(stamps).with_suffix("")): name_of(p) for p in sorted(stamps.rglob("*.txt"))}
    names = {k: v for k, v in names.items() if v}
    speak_names({k: v for k, v in names.items() if len(v) <= 80}, out / "speech-en")
    write(out / "images.jsonl", image_manifest(out, corpora))
    write(out / "audio.jsonl", audio_manifest(out, corpora))
    write(out / "text.jsonl", text_manifest(out, corpora))
    concepts = trimodal_manifest(out, corpora, names)
    write(out / "trimodal.jsonl", concepts)
    write(out / "phrases.jsonl", speak_phrases(phrases_of(concepts, names), out))
    write(out / "questions.jsonl", speak_questions(Path(__file__).with_name("phrasings.toml"), out))


if __name__ == "__main__":
    main()
