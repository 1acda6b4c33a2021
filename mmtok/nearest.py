"""Nearest-code search of all quantizers: exact, in constant memory, the same for every batch, tile and device.

- ``nearest``: the codebook entry nearest to each vector.
- ``nearest_within``: the same, and whether it stays the nearest however a vector is moved a little.
- ``near_ties``: which vectors have a second entry almost as near, as a ``NearTies`` report.

What is nearest is a definition, not a matter of rounding: the differences of a vector and an entry are taken, squared
and summed in float64, the sum by folding the second half of the dimensions onto the first until one is left; the least
sum wins, of equal ones the lowest index. Only single float64 operations take part, which IEEE 754 rounds alike on
every machine, so that a code depends on its own vector and the codebook alone.

Nearly all of the work is done in float32, a tile of scores at a time, with a proven bound on its error
(``_error_bound``). Entries that the bound cannot tell apart are decided as defined. On a CUDA device a Triton kernel
(``mmtok.nearest_triton``) does the float32 part without a tile in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from mmtok.errors import VocabularyError

# A tile is ROWS vectors by TILE // ROWS codes (fewer vectors: more codes), 4 MB of scores in float32: large enough that
# the some twenty small operations after each matrix product do not count, small enough to stay in a cache.
ROWS = 512
TILE = 2**20
# Codes in a group. Only groups whose least score qualifies are looked into, and the minimum over all groups is one
# vectorised pass, many times quicker than torch.min or torch.argmin, which track an index.
GROUP = 32
# Candidates kept before they are decided, and elements of a float64 slice while deciding.
PENDING = 2**20
SLICE = 2**18


@torch.no_grad()
def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the entry at the least squared Euclidean distance of each vector, int64 [N].

    Memory beside arguments and result: some tens of MB and a few numbers for each vector and each entry, never N x K (a
    few hundred MB where thousands of entries are equally near, as in a codebook of zeros).
    The result does not depend on the other vectors, on threads, on tiles, on autocast or matmul precision settings.

    Args:
        vectors: float [N, d] on any device. float16 and bfloat16 are widened, which is exact; float64 is searched in
            float64, at about half the speed.
        codebook: float [K, d], K and d at least 1, on the same device; its dtype may be another one.

    Raises:
        VocabularyError: shapes, dtypes or devices that do not fit, an empty codebook, a vector or an entry that is not
            finite (named by its row), or norms whose squares do not fit in float64.
    """
    _check(vectors, codebook)
    return _search(vectors.detach(), codebook.detach())


@torch.no_grad()
def nearest_within(vectors: Tensor, codebook: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """The nearest entry of each vector, and whether it is that of every vector near it.

    For vectors that were computed in a way that rounds otherwise than the one that counts: where the answer is yes,
    the code is the same in both, as long as they differ by no more than ``noise``.

    Args:
        vectors, codebook: as for ``nearest``.
        noise: how far a vector may be moved, as a share of its length.

    Returns:
        (int64 [N] as ``nearest``, bool [N]).

    Raises:
        VocabularyError: as ``nearest``.
    """
    _check(vectors, codebook)
    x, c = vectors.detach(), codebook.detach()
    if not len(x):
        return _search(x, c), torch.empty(0, dtype=torch.bool, device=x.device)
    bound = _error_bound(x, c, torch.float32)
    if bound is None or _products_are_rough(x) or torch.float64 in (x.dtype, c.dtype):
        return _search(x, c), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    half, slack = bound
    reach = noise * torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    # Moving x by r changes the difference of two scores by at most r |a - b|, and no two entries are further apart
    # than twice the longest is long.
    wide = slack + (reach * 2 * (2 * half.max()).sqrt()).to(slack)
    rows, codes, complete = _candidates(x, c, torch.float32, half, wide)
    index = torch.empty(len(x), dtype=torch.int64, device=x.device)
    sure = torch.full((len(x),), complete, device=x.device)
    if len(rows) == len(x):
        return index.scatter_(0, rows, codes), sure
    at, code = _decide(x, c, rows, codes)
    index.scatter_(0, at, code)
    other = index[rows] != codes
    rows, codes = rows[other], codes[other]
    first = index[rows]
    margin = _distances(x, c, rows, codes) - _distances(x, c, rows, first)
    apart = torch.linalg.vector_norm(c[codes].double() - c[first].double(), dim=1)
    sure[rows[margin <= 2 * reach[rows] * apart]] = False
    return index, sure


@dataclass(frozen=True, eq=False)
class NearTies:
    """Vectors whose two nearest entries are almost equally near.

    Attributes:
        vectors: how many vectors were looked at.
        within: the relative margin up to which a row is listed.
        rows: int64 [M], ascending: the vectors concerned.
        codes: int64 [M, 2]: the nearest entry, as ``nearest`` gives it, and the second.
        margins: float64 [M]: (second - least) / least of the squared distances; 0 for equal ones.
    """

    vectors: int
    within: float
    rows: Tensor
    codes: Tensor
    margins: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        line = f"{len(self)} of {self.vectors} vectors have a second code within {self.within:g} of the nearest"
        if not len(self):
            return line
        i = int(self.margins.argmin())
        first, second = self.codes[i].tolist()
        return f"{line}; closest: vector {int(self.rows[i])}, codes {first} and {second}, {float(self.margins[i]):.2g}"


@torch.no_grad()
def near_ties(vectors: Tensor, codebook: Tensor, within: float = 1e-6) -> NearTies:
    """Vectors with a second entry whose squared distance exceeds the least by at most ``within`` times the least.

    Where two ways of computing the vectors (tiles, batches, devices) give different codes, these are the vectors that
    may differ. The second entry is the nearest of all others, decided as ``nearest`` decides. Constant memory, the
    time of two searches.

    Args:
        vectors: as for ``nearest``.
        codebook: as for ``nearest``; one of a single entry has no ties.
        within: relative margin, 0 or more; 0 lists exact ties only.

    Raises:
        VocabularyError: as ``nearest``, or ``within`` is negative or not a number.
    """
    _check(vectors, codebook)
    if not within >= 0:
        raise VocabularyError(f"got within={within}, expected a relative margin of 0 or more, such as 1e-6")
    x, c = vectors.detach(), codebook.detach()
    first = _search(x, c)
    if len(c) == 1:
        none = first[:0]
        return NearTies(len(x), within, none, none[:, None].expand(0, 2), none.double())
    second = _search(x, c, skip=first)
    every = torch.arange(len(x), device=x.device)
    least, other = _distances(x, c, every, first), _distances(x, c, every, second)
    # Two distances of 0 are a tie of margin 0, not 0 / 0.
    margins = torch.where(other == least, 0.0, (other - least) / least)
    rows = (margins <= within).nonzero()[:, 0]
    return NearTies(len(x), within, rows, torch.stack([first[rows], second[rows]], 1), margins[rows])


def _check(vectors: Tensor, codebook: Tensor) -> None:
    """Raise VocabularyError unless shapes, dtypes and devices fit."""
    for name, value in (("vectors", vectors), ("codebook", codebook)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 2:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise VocabularyError(f"{name}: got {got}, expected a float tensor [n, d]")
    if not codebook.numel():
        raise VocabularyError(
            f"got an empty codebook {list(codebook.shape)}, expected at least one entry and dimension"
        )
    if vectors.shape[1] != codebook.shape[1]:
        raise VocabularyError(
            f"got vectors of {vectors.shape[1]} dimensions and a codebook of {codebook.shape[1]}, expected equal ones"
        )
    if vectors.device != codebook.device:
        raise VocabularyError(
            f"got vectors on {vectors.device} and a codebook on {codebook.device}, expected one; move one of them"
        )


def _search(x: Tensor, c: Tensor, skip: Tensor | None = None) -> Tensor:
    """The nearest entry of each row, int64 [N]; with ``skip`` int64 [N], the nearest of all but that one."""
    if not len(x):
        return torch.empty(0, dtype=torch.int64, device=x.device)
    work = torch.float64 if torch.float64 in (x.dtype, c.dtype) or _products_are_rough(x) else torch.float32
    bound = _error_bound(x, c, work)
    if bound is None:  # squares overflow in float32
        work = torch.float64
        bound = _error_bound(x, c, work)
        assert bound is not None
    if x.is_cuda and work == torch.float32 and skip is None and find_spec("triton"):
        return _fused(x, c, *bound)
    return _tiles(x, c, work, *bound, skip)


def _fused(x: Tensor, c: Tensor, half: Tensor, slack: Tensor) -> Tensor:
    """The search by the Triton kernel; rows whose two least scores the bound cannot tell apart are searched again."""
    from mmtok.nearest_triton import scan

    index, least, second = scan(x, c, half)
    unsure = (second <= least + slack).nonzero()[:, 0]
    if len(unsure):
        index[unsure] = _tiles(x[unsure], c, torch.float32, half, slack[unsure])
    return index


def _products_are_rough(x: Tensor) -> bool:
    """Whether float32 matrix products may be computed with less than float32, or sum too many terms for the bound."""
    backend = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    return backend.matmul.fp32_precision not in ("ieee", "none") or x.shape[1] > 2**16


def _error_bound(x: Tensor, c: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """What a search in dtype ``work`` needs beside its arguments; None if squares do not fit in ``work``.

    The score of an entry is s = |c|^2 / 2 - x.c, half its squared distance but for a term that all entries share. With
    u the unit roundoff, X = |x|, C the greatest |c|, and g(n) = n u / (1 - n u):
    - |c|^2 / 2, from a norm summed in any order, is off by at most g(d + 4) C^2 / 2;
    - the product of d + 1 terms [-x, 1] and [c, |c|^2 / 2], summed in any order with or without fused operations, by at
      most g(d + 1) (X C + C^2 / 2 (1 + g(d + 4))) (Higham, Accuracy and Stability of Numerical Algorithms, 3.1);
    - both together, and the rounding of the limit against which scores are compared, stay below g(2d + 8) C (X + C).
    So the nearest entry has a score of at most the least computed score plus twice that. Three things are added:
    - the distances that decide are float64 numbers themselves, of a relative error below (log2(d) + 5) 2^-53 each, and
      are at most (X + C)^2;
    - products and squares that underflow: the norms are raised by d sqrt(tiny), the bound by 4 (2d + 8) tiny;
    - a tenth, for n u / (1 - n u) up to d = 65,536, the rounding of X and C, and of these lines themselves.

    Returns:
        (|c|^2 / 2 of each entry, [K]; by how much the score of a row's nearest entry may exceed the least score, [N])

    Raises:
        VocabularyError: a row of either is not finite, or squares do not fit in float64.
    """
    d, info = x.shape[1], torch.finfo(work)
    lengths = torch.linalg.vector_norm(c, dim=1, dtype=work)
    reach = torch.linalg.vector_norm(x, dim=1, dtype=work)
    longest, most = float(lengths.max()), float(reach.max())
    if not (longest + most) * (longest + most) < info.max / 16:
        for name, value, norms in (("vector", x, reach), ("codebook entry", c, lengths)):
            for row in (~norms.isfinite()).nonzero()[:, 0].tolist():
                if not value[row].isfinite().all():
                    raise VocabularyError(
                        f"{name} {row} holds NaN or infinity, so that nothing is nearest; expected numbers"
                    )
        if work == torch.float64:
            raise VocabularyError(
                f"got vectors of norm up to {most:.3g}, entries up to {longest:.3g}, expected squares that fit float64"
            )
        return None
    floor = d * math.sqrt(info.tiny)
    longest += floor
    rounding = 1.1 * (2 * d + 8) * info.eps  # eps = 2u
    deciding = 1.1 * (math.log2(d) + 5) * 2.0**-53 * (most + longest)
    slope = rounding * longest + deciding
    slack = reach.mul_(slope).add_(slope * (longest + floor) + 4 * (2 * d + 8) * info.tiny)
    return lengths.square_().mul_(0.5), slack


def _tiles(x: Tensor, c: Tensor, work: torch.dtype, half: Tensor, slack: Tensor, skip: Tensor | None = None) -> Tensor:
    """The search by tiles: candidates by score, decided in float64 where there are several."""
    at, code, _ = _candidates(x, c, work, half, slack, skip)
    if len(at) > len(x):
        at, code = _decide(x, c, at, code)
    return torch.empty(len(x), dtype=torch.int64, device=x.device).scatter_(0, at, code)


def _candidates(
    x: Tensor, c: Tensor, work: torch.dtype, half: Tensor, slack: Tensor, skip: Tensor | None = None
) -> tuple[Tensor, Tensor, bool]:
    """Rows and codes, int64 [P] each, of all pairs whose score is in ``slack`` [N] of the least of their row.

    The nearest pair of each row is among them. The third value is False where there were too many to keep, of which
    some were decided on the way. Scores are computed in tiles [codes, rows].

    Codes come first in a tile because matrix libraries are quick at tall products of few columns and slow at wide ones,
    and because minima over groups of codes then run over whole rows of memory.
    """
    (n, d), k = x.shape, len(c)
    rows = min(n, ROWS)
    codes = min(-(-k // GROUP), max(1, TILE // rows // GROUP)) * GROUP
    least = torch.full((n,), math.inf, dtype=work, device=x.device)
    scores = torch.empty(codes * rows, dtype=work, device=x.device)
    book = torch.empty((codes, d + 1), dtype=work, device=x.device)
    part = torch.ones((rows, d + 1), dtype=work, device=x.device)
    found: list[tuple[Tensor, ...]] = []
    count, complete = 0, True
    for offset in range(0, k, codes):
        some = min(codes, k - offset)
        book[:some, :d] = c[offset : offset + some]
        book[:some, d] = half[offset : offset + some]
        if some < codes:  # entries that are never chosen
            book[some:, :d] = 0.0
            book[some:, d] = math.inf
        for start in range(0, n, rows):
            m = min(rows, n - start)
            torch.mul(x[start : start + m], -1.0, out=part[:m, :d])
            tile = scores[: codes * m].view(codes, m)
            torch.mm(book, part[:m].T, out=tile)  # autocast leaves calls with out= alone
            if skip is not None:
                at = skip[start : start + m] - offset
                inside = ((at >= 0) & (at < some)).nonzero()[:, 0]
                tile[at[inside], inside] = math.inf
            groups = tile.view(-1, GROUP, m)
            group_least = groups.amin(1)
            row_least = least[start : start + m]
            torch.minimum(row_least, group_least.amin(0), out=row_least)
            limit = row_least + slack[start : start + m]
            if skip is not None:  # where all of a tile is skipped, the least is infinite: not a candidate
                limit.clamp_(max=torch.finfo(work).max)
            group, row = (group_least <= limit).nonzero(as_tuple=True)
            near = groups[group, :, row]
            pair, step = (near <= limit[row][:, None]).nonzero(as_tuple=True)
            code = torch.add(step + offset, group[pair], alpha=GROUP)
            found.append((row[pair] + start, code, near[pair, step]))
            count += len(pair)
            if count > PENDING + n:
                at, code = _decide(x, c, *_within(found, least + slack)[:2])
                found = [(at, code, least.new_full((len(at),), -math.inf))]  # to be decided against later ones
                count, complete = len(at), False
        if len(found) > 1:
            found = [_within(found, least + slack)]
            count = len(found[0][0])
    return found[0][0], found[0][1], complete


def _within(found: list[tuple[Tensor, ...]], limit: Tensor) -> tuple[Tensor, ...]:
    """Of all candidates (rows, codes, scores) those within the limit of their row, as one such tuple."""
    rows, codes, scores = (torch.cat(column) for column in zip(*found, strict=True))
    near = scores <= limit[rows]
    return rows[near], codes[near], scores[near]


def _decide(x: Tensor, c: Tensor, rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pairs (rows, codes), int64 [P] each, the nearest by definition of each row: rows ascending, and codes."""
    n, k = len(x), len(c)
    distances = _distances(x, c, rows, codes)
    least = torch.full((n,), math.inf, dtype=torch.float64, device=x.device)
    least.scatter_reduce_(0, rows, distances, "amin")
    ties = distances == least[rows]
    lowest = torch.full((n,), k, device=x.device).scatter_reduce_(0, rows[ties], codes[ties], "amin")
    rows = (lowest < k).nonzero()[:, 0]
    return rows, lowest[rows]


def _distances(x: Tensor, c: Tensor, rows: Tensor, codes: Tensor) -> Tensor:
    """The squared distances that decide, float64 [P], of the pairs (rows, codes), both int64 [P]."""
    out = torch.empty(len(rows), dtype=torch.float64, device=x.device)
    size = max(1, SLICE // x.shape[1])
    for start in range(0, len(rows), size):
        some = slice(start, start + size)
        terms = x[rows[some]].double() - c[codes[some]].double()
        terms *= terms  # not fused with the sum: a product rounds alike everywhere
        while (d := terms.shape[1]) > 1:
            upper = (d + 1) // 2
            terms[:, : d - upper] += terms[:, upper:]
            terms = terms[:, :upper]
        out[some] = terms[:, 0]
    return out
