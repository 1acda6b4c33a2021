"""The states of the sequence grammar of one registry: what ``automaton`` compiles to tensors and ``grammar`` parses by.

    document := <bos> turn* <eos>
    turn     := [<user> | <assistant>] segment*
    segment  := text-id+ | <image> grid(h) grid(w) code{h*w*L} </image> | <audio> code* </audio>

The codes of an image stand row by row; of a tokenizer with L levels (residual vector quantization) each position has L
codes, from coarse to fine. The codes of an audio segment stand in the order of the tokenizer's layout (``layouts``);
where a delayed layout has no code, its fill token stands. A state is a phase (a node of the automaton) and two numbers:
a counter (image height, image positions to come, audio frames or steps) and a total (the frames of an audio segment,
once they are known). Ids fall into classes, and each edge (phase, class) says when it may be taken and what it does to
the numbers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from mmtok.layouts import CodebookMajor, Delayed, Layout
from mmtok.registry import TokenizerSpec, VocabularyRegistry

START, BODY, DONE, FAILED = range(4)  # phases that every registry has; body is where a segment may start
NO_ID, PAD, BOS, EOS, TURN, GRID = range(6)  # classes that every registry has; GRID is size 1, GRID + 1 size 2 ...
ANY, SIZE, FRAMES = range(3)  # bounds: none; of an exact image size; of the frames of each audio tokenizer, and up
FAR = 2**40  # more than any counter


@dataclass(frozen=True)
class Edge:
    """One step of the automaton.

    Attributes:
        to: the next phase.
        counter: (times, plus): the counter n becomes times * n + plus.
        total: (keep, take): the total T becomes keep * T + take * n.
        window: (low, high): the edge may be taken if low < n <= T + high.
        outside: it may be taken if that is not so.
        starts: a segment begins.
    """

    to: int
    counter: tuple[int, int] = (0, 0)
    total: tuple[int, int] = (0, 0)
    window: tuple[int, int] = (-1, FAR)
    outside: bool = False
    starts: bool = False


@dataclass(frozen=True)
class Cost:
    """The tokens from a phase to the end of the document, at least:
    base + area * h * w + width * w * n + count * n + total * T + frames * max(least, n + started),
    with h, w the smallest image size, n the counter, T the total and least the smallest number of frames.

    Attributes:
        bound: which bounds ``least`` is of; ``n + started`` frames have begun, which must not exceed the other one.
    """

    base: int
    area: int = 0
    width: int = 0
    count: int = 0
    total: int = 0
    frames: int = 0
    started: int = 0
    bound: int = ANY


@dataclass
class Phase:
    """A node of the automaton.

    Attributes:
        cost: of the way to the end.
        modality: of the segment that it belongs to; text between segments.
        zero: the phase that this one becomes when it is entered with the counter at 0.
        refill: the counter is then refill * T.
        edges: class -> edge.
        expected: what may follow, in words, if the names of the classes do not say it.
    """

    cost: Cost
    modality: str = "text"
    zero: int | None = None
    refill: int = 0
    edges: dict[int, Edge] = field(default_factory=dict)
    expected: str = ""


@dataclass(frozen=True)
class Bracketed:
    """An image or audio tokenizer in the automaton.

    Attributes:
        tokenizer: its name.
        modality: ``image`` or ``audio``.
        opening, closing: ids.
        first: the phase after the opening. Images go on to first + 1 (width), + 2 (codes, a phase a level), closing.
        codes: the class of each codebook, consecutive numbers; the class of the fill, if there is one, follows.
        layout: of audio, over ids: its fill is the id of the fill token; None for images.
        bound: of the number of frames: FRAMES or more for audio.
    """

    tokenizer: str
    modality: str
    opening: int
    closing: int
    first: int
    codes: range
    layout: Layout | None = None
    bound: int = ANY

    @property
    def lead(self) -> int:
        """Steps of a delayed layout before any level has its first code."""
        return min(self.layout.delays) if isinstance(self.layout, Delayed) else 0

    @property
    def spread(self) -> int:
        """Steps of a delayed layout from the first level's end to the last one's."""
        return max(self.layout.delays) - self.lead if isinstance(self.layout, Delayed) else 0

    @property
    def deciding(self) -> int:
        """The level of a delayed layout whose first fill ends the sound."""
        return self.layout.delays.index(self.lead) if isinstance(self.layout, Delayed) else 0

    @property
    def closes_by_choice(self) -> bool:
        """Whether the closing is what ends the sound, after any frame; else something before it says so."""
        major = isinstance(self.layout, CodebookMajor) and len(self.codes) > 1
        return self.modality == "audio" and not self.spread and not major


class States:
    """The automaton of a registry's sequences, in plain Python and numpy.

    Attributes:
        phases: the nodes; START, BODY, DONE and FAILED first.
        names: of each class, for messages.
        classes: int64 [padded_size + 1], the class of each id; the last entry is for ids out of range.
        texts: class -> name of the text tokenizer.
        brackets: opening class -> image or audio tokenizer.
    """

    def __init__(self, registry: VocabularyRegistry) -> None:
        self.registry = registry
        self.names = [""]
        self.classes = np.full(registry.padded_size + 1, NO_ID, np.int64)
        self.texts: dict[int, str] = {}
        self.brackets: dict[int, Bracketed] = {}
        for name, ids in (
            ("<pad>", [registry.pad]),
            ("<bos>", [registry.bos]),
            ("<eos>", [registry.eos]),
            ("<user>, <assistant>", [registry.user, registry.assistant]),
        ):
            self._class(name, np.array(ids))
        grid = registry.block("grid")
        for id in range(grid.start, grid.end):
            self._class("grid size", np.array([id]))

        self.phases = [Phase(Cost(2)), Phase(Cost(1)), Phase(Cost(0)), Phase(Cost(0))]
        self.phases[START].edges[BOS] = Edge(BODY)
        self.phases[DONE].edges[PAD] = Edge(DONE)
        self.phases[FAILED].edges[PAD] = Edge(FAILED)
        self.phases[FAILED].expected = "nothing, the sequence is invalid"
        starts: dict[int, Edge] = {}
        for spec in registry.tokenizers:
            first = len(self.phases)
            if spec.modality == "text":
                block = registry.blocks_of(spec.name)[0]
                kind = self._class("text", np.arange(block.start, block.end))
                self.texts[kind] = spec.name
                self.phases.append(Phase(Cost(1)))
            else:
                kind, bracket, phases, steps = self._bracketed(spec, first)
                self.brackets[kind] = bracket
                self.phases += phases
            starts[kind] = Edge(first, starts=True) if kind in self.texts else Edge(first, (0, steps), starts=True)
        between = starts | {TURN: Edge(BODY), EOS: Edge(DONE)}
        self.phases[BODY].edges = between
        for kind in self.texts:  # a text goes on until something else starts
            first = starts[kind].to
            self.phases[first].edges = between | {kind: Edge(first)}

    def _class(self, name: str, ids: np.ndarray) -> int:
        """A new class with these members."""
        self.names.append(name)
        self.classes[ids] = len(self.names) - 1
        return len(self.names) - 1

    def _bracketed(self, spec: TokenizerSpec, first: int) -> tuple[int, Bracketed, list[Phase], int]:
        """Class of the opening, the tokenizer, its phases, and the counter that the first of them starts with."""
        r = self.registry
        opening, closing = r.opening(spec.name), r.closing(spec.name)
        blocks = r.blocks_of(spec.name)
        codes = [self._class(r.kind(b), np.arange(b.start, b.end)) for b in blocks]
        layout, bound, steps = None, ANY, 0
        if spec.modality == "audio":
            layout = spec.codebook_layout
            bound = FRAMES + sum(b.modality == "audio" for b in self.brackets.values())
            if isinstance(layout, Delayed):
                fill = r.fill(spec.name)
                layout = dataclasses.replace(layout, fill=fill)
                self._class(r.describe(fill), np.array([fill]))
        start = self._class(r.describe(opening), np.array([opening]))
        end = self._class(r.describe(closing), np.array([closing]))
        bracket = Bracketed(
            spec.name, spec.modality, opening, closing, first, range(codes[0], codes[-1] + 1), layout, bound
        )
        if layout is None:
            return start, bracket, self._image(bracket, end), 0
        if isinstance(layout, CodebookMajor) and len(codes) > 1:
            phases = _codebook_major(bracket, end, layout)
        elif bracket.spread:
            phases = _delayed(bracket, end, layout)
        else:
            phases = _frames(bracket, end, layout)
        if bracket.lead:
            steps = bracket.lead * len(codes)
        for phase in phases:
            phase.modality = "audio"
        return start, bracket, phases, steps

    def _image(self, b: Bracketed, end: int) -> list[Phase]:
        """Height, width, a phase for each level of a position, of which the last counts it, closing."""
        sizes, label, levels = range(1, self.registry.max_grid + 1), self.names[end][2:-1], len(b.codes)
        height = Phase(Cost(4, area=levels), "image", expected=f"grid size (height of {label})")
        width = Phase(Cost(3, width=levels), "image", expected=f"grid size (width of {label})")
        codes, closing = b.first + 2, b.first + 2 + levels
        height.edges = {GRID + v - 1: Edge(b.first + 1, (0, v)) for v in sizes}
        width.edges = {GRID + v - 1: Edge(codes, (v, 0)) for v in sizes}
        out = [height, width]
        for q, kind in enumerate(b.codes):
            last = q + 1 == levels
            code = Edge(codes if last else codes + q + 1, (1, -int(last)))
            zero = None if q else closing
            out.append(Phase(Cost(2 - q, count=levels), "image", edges={kind: code}, zero=zero))
        return [*out, Phase(Cost(2), "image", edges={end: Edge(BODY)})]

    # --- one token at a time, in plain Python

    def step(self, phase: int, counter: int, total: int, kind: int) -> tuple[int, int, int] | None:
        """The state after one more id of this class, None if it may not follow."""
        edge = self.phases[phase].edges.get(kind)
        if edge is None or (edge.window[0] < counter <= total + edge.window[1]) == edge.outside:
            return None
        total, counter = (
            edge.total[0] * total + edge.total[1] * counter,
            edge.counter[0] * counter + edge.counter[1],
        )
        after = self.phases[edge.to]
        if counter == 0 and after.zero is not None:
            return after.zero, after.refill * total, total
        return edge.to, counter, total

    def expected(self, phase: int, counter: int, total: int) -> str:
        """What may follow, in words."""
        here = self.phases[phase]
        if here.expected:
            return here.expected
        kinds = [kind for kind in sorted(here.edges, key=lambda k: k == EOS) if self.step(phase, counter, total, kind)]
        words = list(dict.fromkeys(self.names[kind] for kind in kinds))
        return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _frames(b: Bracketed, end: int, layout: Layout) -> list[Phase]:
    """Frame after frame: a phase a slot, the counter goes up with the last one; the closing ends it.

    A delayed layout whose levels are all shifted alike is this after the fills that come first.
    """
    lead = _lead(b, 0)
    slots, first = layout.slot_levels, b.first + len(lead)
    out = []
    for j, level in enumerate(slots):
        cost = Cost(2 - j, count=-len(slots), frames=len(slots), started=int(j > 0), bound=b.bound)
        last = j + 1 == len(slots)
        code = Edge(first if last else first + j + 1, (1, int(last)))
        out.append(Phase(cost, edges={b.codes[level]: code}))
    out[0].edges[end] = Edge(BODY)
    return lead + out


def _lead(b: Bracketed, spread: int) -> list[Phase]:
    """The fills before any level begins, counted down."""
    if not b.lead:
        return []
    k = len(b.codes)
    cost = Cost(2 + spread * k, count=1, frames=k, started=-FAR, bound=b.bound)
    fills = Edge(b.first, (1, -1))
    return [Phase(cost, edges={b.codes[-1] + 1: fills}, zero=b.first + 1)]


def _delayed(b: Bracketed, end: int, layout: Layout) -> list[Phase]:
    """Steps of one place a level. While the sound goes on, a level has codes from its delay on; the counter is the
    step. A fill at the deciding level fixes the total; from there the counter is the steps left."""
    assert isinstance(layout, Delayed)
    k, spread, fill = len(b.codes), b.spread, b.codes[-1] + 1
    delays = [d - b.lead for d in layout.delays]
    lead = _lead(b, spread)
    first = b.first + len(lead)
    ending, closing = first + k, first + 2 * k
    going, stopping = [], []
    for j, delay in enumerate(delays):
        last = j + 1 == k
        cost = Cost(2 + spread * k - j, count=-k, frames=k, started=int(j > b.deciding), bound=b.bound)
        code = Edge(first if last else first + j + 1, (1, int(last)), window=(delay - 1, FAR))
        gap = dataclasses.replace(code, outside=True)
        if j == b.deciding:
            gap = Edge(ending if last else ending + j + 1, (0, spread - last), total=(0, 1))
        going.append(Phase(cost, edges={b.codes[j]: code, fill: gap}))
        behind = spread - delay
        code = Edge(ending if last else ending + j + 1, (1, -int(last)), (1, 0), window=(behind, behind))
        edges = {b.codes[j]: code, fill: dataclasses.replace(code, outside=True)}
        stopping.append(Phase(Cost(2 - j, count=k), edges=edges, zero=None if j else closing))
    return [*lead, *going, *stopping, Phase(Cost(2), edges={end: Edge(BODY)})]


def _codebook_major(b: Bracketed, end: int, layout: CodebookMajor) -> list[Phase]:
    """Level 0 for as long as it likes, the counter goes up with each frame; then the other levels, counted down."""
    rates = layout.rates
    out = []
    for i in range(rates[0]):
        cost = Cost(2 - i, count=-rates[0], frames=sum(rates), started=int(i > 0), bound=b.bound)
        last = i + 1 == rates[0]
        out.append(Phase(cost, edges={b.codes[0]: Edge(b.first if last else b.first + i + 1, (1, int(last)))}))
    later = b.first + rates[0] - 1  # the phase of level q is later + q, that of the closing follows
    out[0].edges[b.codes[1]] = Edge(later + 1, (rates[1], -1), (0, 1), window=(0, FAR))
    out[0].edges[end] = Edge(BODY, window=(-1, 0))
    for q in range(1, len(rates)):
        code = Edge(later + q, (1, -1), (1, 0))
        rest = rates[q + 1 :]
        cost = Cost(2, count=1, total=sum(rest))
        out.append(Phase(cost, edges={b.codes[q]: code}, zero=later + q + 1, refill=rest[0] if rest else 0))
    return [*out, Phase(Cost(2), edges={end: Edge(BODY)})]
