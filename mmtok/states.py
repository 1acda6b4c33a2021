"""The states of the sequence grammar of one registry: what ``automaton`` compiles to tensors and ``grammar`` parses by.

    document := <bos> turn* <eos>
    turn     := [<user> | <assistant>] segment*
    segment  := text-id+ | <image> grid(h) grid(w) code{h*w} </image> | <audio> frame* </audio>
    frame    := one code of each level of the audio tokenizer, level 0 first

A state is a phase (a node of an automaton) and one counter: the image height while the width is awaited, then the
image codes still to come; in audio, the frames so far. Ids fall into classes, and (phase, class) gives the next phase.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mmtok.registry import VocabularyRegistry

START, BODY, DONE, FAILED = range(4)  # phases that every registry has; body is where a segment may start
NO_ID, PAD, BOS, EOS, TURN, GRID = range(6)  # classes that every registry has


@dataclass
class Phase:
    """A node of the automaton.

    Attributes:
        expected: what may follow, in words.
        modality: of the segment that it belongs to; text between segments.
        count: (a, b, c, d): an id of grid size v makes the counter n into a * n + b * v + c * n * v + d.
        cost: (base, area, width, count, levels, started): the tokens from here to the end of the document, at least,
            are base + area * h * w + width * n * w + count * n + levels * max(0, min_frames - n - started),
            with h, w the smallest image size and n the counter.
        edges: class -> next phase.
        bulk: classes of text and audio codes that are one choice among others here.
    """

    expected: str
    modality: str = "text"
    count: tuple[int, int, int, int] = (0, 0, 0, 0)
    cost: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    edges: dict[int, int] = field(default_factory=dict)
    bulk: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bracketed:
    """An image or audio tokenizer in the automaton.

    Attributes:
        tokenizer: its name.
        modality: ``image`` or ``audio``.
        opening, closing: ids.
        first: the phase after the opening. Images go on to first + 1 (width), + 2 (codes), + 3 (closing);
            audio goes round first + q, the phase that awaits level q.
        codes: the class of each codebook, consecutive numbers.
    """

    tokenizer: str
    modality: str
    opening: int
    closing: int
    first: int
    codes: range


class States:
    """The automaton of a registry's sequences, in plain Python and numpy.

    Attributes:
        phases: the nodes; START, BODY, DONE and FAILED first.
        members: for each class, its ids.
        classes: int64 [padded_size + 1], the class of each id; the last entry is for ids out of range.
        sizes: int64 [padded_size + 1], for a grid id the size it stands for, else 0.
        texts: class -> name of the text tokenizer.
        brackets: opening class -> image or audio tokenizer.
    """

    def __init__(self, registry: VocabularyRegistry) -> None:
        self.registry = registry
        self.members: list[np.ndarray] = [np.zeros(0, np.int64)]
        self.classes = np.full(registry.padded_size + 1, NO_ID, np.int64)
        self.sizes = np.zeros(registry.padded_size + 1, np.int64)
        self.texts: dict[int, str] = {}
        self.brackets: dict[int, Bracketed] = {}
        for ids in ([registry.pad], [registry.bos], [registry.eos], [registry.user, registry.assistant]):
            self._class(np.array(ids))
        grid = registry.block("grid")
        self._class(np.arange(grid.start, grid.end))
        self.sizes[grid.start : grid.end] = np.arange(1, grid.size + 1)

        self.phases = [Phase("<bos>", cost=(2, 0, 0, 0, 0, 0)), Phase("", cost=(1, 0, 0, 0, 0, 0))]
        self.phases += [Phase("<pad>"), Phase("nothing, the sequence is invalid")]
        body = self.phases[BODY]
        self.phases[START].edges[BOS] = BODY
        self.phases[DONE].edges[PAD] = DONE
        body.edges |= {EOS: DONE, TURN: BODY}
        words = ["<user>", "<assistant>"]
        for spec in registry.tokenizers:
            codes = [self._class(np.arange(b.start, b.end)) for b in registry.blocks_of(spec.name)]
            if spec.modality == "text":
                self.texts[codes[0]] = spec.name
                body.edges[codes[0]] = BODY
                continue
            opening, closing = registry.opening(spec.name), registry.closing(spec.name)
            words.append(registry.describe(opening))
            start, end = self._class(np.array([opening])), self._class(np.array([closing]))
            bracket = Bracketed(
                spec.name, spec.modality, opening, closing, len(self.phases), range(codes[0], codes[-1] + 1)
            )
            self.phases += self._image(bracket, end) if spec.modality == "image" else self._audio(bracket, end)
            body.edges[start] = bracket.first
            self.brackets[start] = bracket
        body.expected = ", ".join(["text"] * bool(self.texts) + words) + " or <eos>"
        body.bulk = tuple(self.texts)

    def _class(self, ids: np.ndarray) -> int:
        """A new class with these members."""
        self.members.append(ids.astype(np.int64))
        self.classes[ids] = len(self.members) - 1
        return len(self.members) - 1

    def _image(self, b: Bracketed, end: int) -> list[Phase]:
        """Height, width, codes, closing. The step from codes to closing is taken when the counter reaches 0."""
        code, label = b.codes[0], self.registry.blocks_of(b.tokenizer)[0].name
        closing = self.registry.describe(b.closing)
        return [
            Phase(f"grid size (height of {label})", "image", (0, 1, 0, 0), (4, 1, 0, 0, 0, 0), {GRID: b.first + 1}),
            Phase(f"grid size (width of {label})", "image", (0, 0, 1, 0), (3, 0, 1, 0, 0, 0), {GRID: b.first + 2}),
            Phase(f"{label} code", "image", (1, 0, 0, -1), (2, 0, 0, 1, 0, 0), {code: b.first + 2}),
            Phase(closing, "image", (0, 0, 0, 0), (2, 0, 0, 0, 0, 0), {end: BODY}),
        ]

    def _audio(self, b: Bracketed, end: int) -> list[Phase]:
        """One phase a level; the counter goes up with the last level of a frame."""
        k, label = len(b.codes), self.registry.blocks_of(b.tokenizer)[0].name.rpartition(".")[0]
        out = []
        for q, code in enumerate(b.codes):
            last = int(q == k - 1)
            phase = Phase(
                f"{label} level {q} code", "audio", (1, 0, 0, last), (2 + (k - q) % k, 0, 0, 0, k, int(q > 0))
            )
            phase.edges[code] = b.first + (q + 1) % k
            out.append(phase)
        out[0].edges[end] = BODY
        out[0].bulk = (b.codes[0],)
        out[0].expected += f" or {self.registry.describe(b.closing)}"
        return out
