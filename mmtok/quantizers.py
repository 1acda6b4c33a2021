"""One interface over all quantizers: vectors -> codes -> vectors.

    name     class                  codebook                                 paper
    vq       VectorQuantizer        moving averages of what a code stands    https://arxiv.org/abs/1711.00937, A.1
                                    for, levels of residuals if wanted       https://arxiv.org/abs/2107.03312
    cosine   VectorQuantizer        the same on the unit sphere              https://arxiv.org/abs/2110.04627
    simvq    SimVQuantizer          fixed noise through a learnt matrix      https://arxiv.org/abs/2411.02038
    fsq      FiniteScalarQuantizer  rounding of a few bounded channels       https://arxiv.org/abs/2309.15505
    lfq      LookupFreeQuantizer    signs of channels on the unit sphere     https://arxiv.org/abs/2406.07548

``build_quantizer`` makes one by its name. All of them project to a few channels first, because codes are searched
better in a low dimension, and back after. simvq, fsq and lfq are vector-quantize-pytorch's modules, vq is
``mmtok.codebook``. Which code a vector has is decided by ``mmtok.nearest``, by rounding or by a sign, never by anything
else in the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ, LFQ, SimVQ

from mmtok.codebook import Codebook, distributed, sum_over_ranks
from mmtok.errors import ConfigError, VocabularyError
from mmtok.nearest import near_ties, nearest, nearest_within

COMMITMENT = 0.25  # weight of the pull of the vectors to their codes, beside the loss of the reconstruction
KINDS = ("vq", "cosine", "simvq", "fsq", "lfq")


class Quantizer(nn.Module, ABC):
    """Projects to ``codebook_dim``, quantizes, projects back.

    Args:
        dim: channels of the vectors.
        codebook_dim: channels in which codes are searched.
        codebook_sizes: codes of each level; more than one level only where residuals are quantized again.
    """

    def __init__(self, dim: int, codebook_dim: int, codebook_sizes: Sequence[int]) -> None:
        super().__init__()
        self.codebook_sizes = tuple(codebook_sizes)
        self.project_in = nn.Linear(dim, codebook_dim)
        self.project_out = nn.Linear(codebook_dim, dim)

    def forward(self, z: Tensor, levels: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize with straight-through gradients; in training mode codebooks of moving averages move.

        Args:
            z: float [B, N, dim].
            levels: use only the first so many levels (quantizer dropout).

        Returns:
            (float [B, N, dim], codes int64 [B, N, levels], the quantizer's own loss, a scalar, ready to be added).
        """
        with torch.autocast(z.device.type, enabled=False):
            z = self.project_in(z.float())
            quantized, codes, loss = self._train(z, levels)
            return self.project_out(quantized), codes, loss

    @torch.no_grad()
    def encode(self, z: Tensor, levels: int | None = None) -> Tensor:
        """Codes int64 [B, N, levels] of float [B, N, dim]; changes no state in any mode."""
        with torch.autocast(z.device.type, enabled=False):
            return self.search(self.project_in(z.float()), levels)

    @torch.no_grad()
    def encode_within(self, z: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """As ``encode`` with one level, and bool [B, N]: which codes stay however a projected vector is moved a little.

        Args:
            z: float [B, N, dim].
            noise: how far, as a share of the length of the projected vector.
        """
        with torch.autocast(z.device.type, enabled=False):
            return self.search_within(self.project_in(z.float()), noise)

    def near_ties(self, z: Tensor, within: float) -> Tensor | None:
        """Which codes of float [B, N, dim] have a second one almost as near, see ``mmtok.nearest.near_ties``.

        Args:
            z: as for ``encode``.
            within: relative margin of the squared distances.

        Returns:
            bool [B, N, levels]; None where codes are not the nearest of listed vectors.
        """
        return None

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors float32 [B, N, dim] of codes int64 [B, N, L], where L is any number of levels from the first.

        Raises:
            VocabularyError: a code is outside the codebook, or there are more levels than codebooks.
        """
        sizes = self.codebook_sizes
        if not 1 <= codes.shape[-1] <= len(sizes):
            raise VocabularyError(f"got codes of {codes.shape[-1]} levels, expected 1 to {len(sizes)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < sizes[0]:
            raise VocabularyError(
                f"got codes from {int(codes.min())} to {int(codes.max())}, expected 0 to {sizes[0] - 1}"
            )
        return self.project_out(self.vectors(codes))

    @torch.no_grad()
    def align(self, z: Tensor) -> None:
        """Let the projections keep what varies most in vectors float [n, dim]: their principal components.

        Raises:
            ConfigError: the codebook has more channels than the vectors.
        """
        if self.project_in.out_features > self.project_in.in_features:
            raise ConfigError(
                f"got {self.project_in.out_features} channels in the codebook and {self.project_in.in_features} in the "
                "vectors, expected at most as many"
            )
        z = z.double()
        mean = z.mean(0)
        _, basis = torch.linalg.eigh((z - mean).T @ (z - mean))
        basis = basis[:, -self.project_in.out_features :].flip(1)
        for layer, weight, bias in (
            (self.project_in, basis.T, -mean @ basis),
            (self.project_out, basis, mean),
        ):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Start the codebooks from vectors float [n, dim]; nothing where none is learnt."""

    def restart_averages(self) -> None:
        """Start what only training needs from the codebooks, as if all codes were drawn alike."""

    @abstractmethod
    def _train(self, z: Tensor, levels: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """float32 [B, N, codebook_dim] -> (quantized with gradients, codes [B, N, levels], loss)."""

    @abstractmethod
    def search(self, z: Tensor, levels: int | None) -> Tensor:
        """Codes int64 [B, N, levels] of vectors float32 [B, N, codebook_dim] in the space of the codebook."""

    @abstractmethod
    def search_within(self, z: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """As ``search`` with one level, and which codes stay, bool [B, N]; see ``encode_within``."""

    def codes_of(self, vectors: Tensor) -> Tensor:
        """Codes int64 [B, N, 1] of vectors that are codes' vectors: the inverse of ``vectors``, for one level."""
        return self.search(vectors, 1)

    @abstractmethod
    def vectors(self, codes: Tensor) -> Tensor:
        """Vectors float32 [B, N, codebook_dim] in the space of the codebook, of codes in range int64 [B, N, L]."""


class VectorQuantizer(Quantizer):
    """Nearest entries of codebooks that are moving averages; each further level quantizes what the last left over.

    Args:
        dim, codebook_dim: as for ``Quantizer``.
        codebook_size: codes a level.
        levels: residual levels; 1 is plain vector quantization.
        vectors_per_batch: how many vectors a training batch holds, for the threshold under which a code is revived.
        cosine: search and average on the unit sphere; one level only.
    """

    def __init__(
        self,
        dim: int,
        codebook_dim: int,
        codebook_size: int,
        levels: int = 1,
        vectors_per_batch: int = 4096,
        cosine: bool = False,
    ) -> None:
        super().__init__(dim, codebook_dim, (codebook_size,) * levels)
        self.levels = nn.ModuleList(
            Codebook(codebook_size, codebook_dim, vectors_per_batch, cosine) for _ in range(levels)
        )

    @property
    def books(self) -> list[Codebook]:
        """The codebook of each level."""
        return [level for level in self.levels if isinstance(level, Codebook)]

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Start each level at the k-means centres of vectors float [n, dim], or of what is left of them."""
        residual = self.books[0].on_sphere(self.project_in(z.float()))
        for book in self.books:
            book.start(residual)
            residual = residual - book.entries[book.search(residual)]

    def restart_averages(self) -> None:
        """Start the averages behind the codebooks from the codebooks."""
        for book in self.books:
            book.restart()

    @torch.no_grad()
    def near_ties(self, z: Tensor, within: float) -> Tensor:
        """As ``Quantizer.near_ties``: of each level among the residuals that the levels before it leave."""
        with torch.autocast(z.device.type, enabled=False):
            residual, out = self.books[0].on_sphere(self.project_in(z.float())).flatten(0, 1), []
            for book in self.books:
                tied = torch.zeros(len(residual), dtype=torch.bool, device=z.device)
                tied[near_ties(residual, book.entries, within).rows] = True
                out.append(tied)
                residual = residual - book.entries[book.search(residual)]
        return torch.stack(out, -1).view(*z.shape[:2], len(out))

    def _train(self, z: Tensor, levels: int | None) -> tuple[Tensor, Tensor, Tensor]:
        z = self.books[0].on_sphere(z)
        residual, total, loss, codes = z, torch.zeros_like(z), z.new_zeros(()), []
        for book in self.books[:levels]:
            quantized, index = book(residual)
            loss = loss + F.mse_loss(residual, quantized)
            residual, total = residual - quantized, total + quantized
            codes.append(index)
        return z + (total - z).detach(), torch.stack(codes, -1), COMMITMENT * loss / len(codes)

    def search(self, z: Tensor, levels: int | None) -> Tensor:
        residual, codes = self.books[0].on_sphere(z), []
        for book in self.books[:levels]:
            index = book.search(residual)
            residual = residual - book.entries[index]
            codes.append(index)
        return torch.stack(codes, -1)

    def search_within(self, z: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        return _nearest_within(self.books[0].on_sphere(z), self.books[0].entries, noise)

    def vectors(self, codes: Tensor) -> Tensor:
        parts = [book.entries[codes[..., i]] for i, book in enumerate(self.books[: codes.shape[-1]])]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class SimVQuantizer(Quantizer):
    """Nearest entries of a codebook of fixed noise that one learnt matrix moves as a whole."""

    def __init__(self, dim: int, codebook_dim: int, codebook_size: int) -> None:
        super().__init__(dim, codebook_dim, (codebook_size,))
        self.book = SimVQ(dim=codebook_dim, codebook_size=codebook_size, rotation_trick=True)

    def _train(self, z: Tensor, levels: int | None) -> tuple[Tensor, Tensor, Tensor]:
        quantized, codes, loss = self.book(z)
        return quantized, codes[..., None], COMMITMENT * loss

    def search(self, z: Tensor, levels: int | None) -> Tensor:
        return nearest(z.flatten(0, 1), self.book.codebook.detach()).view(*z.shape[:2], 1)

    def search_within(self, z: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        return _nearest_within(z, self.book.codebook.detach(), noise)

    def vectors(self, codes: Tensor) -> Tensor:
        return self.book.codebook[codes[..., 0]]


class FiniteScalarQuantizer(Quantizer):
    """Each channel bounded and rounded to one of a few values; a code is the combination. Nothing to keep alive.

    Args:
        dim: channels of the vectors.
        levels: values of each channel, at least 3 each; their product is the number of codes.
    """

    def __init__(self, dim: int, levels: Sequence[int]) -> None:
        super().__init__(dim, len(levels), (math.prod(levels),))
        self.book = FSQ(list(levels))

    def _train(self, z: Tensor, levels: int | None) -> tuple[Tensor, Tensor, Tensor]:
        quantized = self.book.quantize(z)
        return quantized, self.book.codes_to_indices(quantized.detach()).long()[..., None], z.new_zeros(())

    def search(self, z: Tensor, levels: int | None) -> Tensor:
        return self.book.codes_to_indices(self.book.quantize(z)).long()[..., None]

    def search_within(self, z: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        return _same_on_both_sides(self, z, noise)

    def codes_of(self, vectors: Tensor) -> Tensor:  # already bounded, which a search does first
        """As ``Quantizer.codes_of``."""
        return self.book.codes_to_indices(vectors).long()[..., None]

    def vectors(self, codes: Tensor) -> Tensor:
        return self.book._indices_to_codes(codes[..., 0])


class LookupFreeQuantizer(Quantizer):
    """The signs of ``log2(codebook_size)`` channels of a vector on the unit sphere, spread by an entropy loss.

    The entropy of a vector's code is exactly the sum over its bits; that of all codes is bounded by that sum, which is
    what is raised here (binary spherical quantization, equation 6): no matrix of vectors by codes, and the mean over
    all ranks of a distributed run.
    """

    def __init__(self, dim: int, codebook_size: int, entropy_weight: float = 0.1, sharpness: float = 100.0) -> None:
        bits = codebook_size.bit_length() - 1
        super().__init__(dim, bits, (codebook_size,))
        self.entropy_weight, self.sharpness = entropy_weight, sharpness
        self.book = LFQ(dim=bits, codebook_size=codebook_size, spherical=True).eval()

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; the library's module stays in eval mode: its training loss is replaced."""
        super().train(mode)
        self.book.eval()
        return self

    def _train(self, z: Tensor, levels: int | None) -> tuple[Tensor, Tensor, Tensor]:
        z = F.normalize(z, dim=-1)
        quantized, codes, _ = self.book(z)
        loss = COMMITMENT * F.mse_loss(z, quantized.detach())
        if self.training:
            one = torch.sigmoid(4 * self.sharpness / z.shape[-1] ** 0.5 * z)  # chance of each bit, [B, N, bits]
            sure, spread = entropy(one).sum(-1).mean(), entropy(mean_over_ranks(one.mean((0, 1)))).sum()
            loss = loss + self.entropy_weight * (sure - spread)
        return z + (quantized - z).detach(), codes.long()[..., None], loss

    def search(self, z: Tensor, levels: int | None) -> Tensor:
        return self.book(z)[1].long()[..., None]

    def search_within(self, z: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        return _same_on_both_sides(self, z, noise)

    def vectors(self, codes: Tensor) -> Tensor:
        return self.book.indices_to_codes(codes[..., 0])


def build_quantizer(
    kind: str,
    dim: int,
    codebook_dim: int,
    codebook_size: int,
    levels: int = 1,
    fsq_levels: Sequence[int] = (),
    vectors_per_batch: int = 4096,
) -> Quantizer:
    """A quantizer by its name.

    Args:
        kind: one of ``KINDS``.
        dim: channels of the vectors.
        codebook_dim: channels in which codes are searched; ``fsq`` and ``lfq`` have their own.
        codebook_size: codes a level.
        levels: residual levels; more than one for ``vq`` only.
        fsq_levels: values of each channel of ``fsq``; their product must be ``codebook_size``.
        vectors_per_batch: how many vectors a training batch holds.

    Raises:
        ConfigError: an unknown kind, or numbers that do not go together.
    """
    if kind not in KINDS:
        raise ConfigError(f"got quantizer {kind!r}, expected one of: {', '.join(KINDS)}")
    if levels < 1 or (levels > 1 and kind != "vq"):
        raise ConfigError(f"got {levels} residual levels of {kind!r}, expected 1, or any number of 'vq'")
    if (kind == "fsq") != bool(fsq_levels):
        raise ConfigError(f"got fsq_levels {list(fsq_levels)} for {kind!r}; they go with 'fsq', which needs them")
    if kind == "fsq":
        if min(fsq_levels) < 3 or math.prod(fsq_levels) != codebook_size:
            raise ConfigError(
                f"got fsq_levels {list(fsq_levels)} for {codebook_size} codes, expected values of at least 3 whose "
                f"product is the number of codes, such as codebook_size={math.prod(fsq_levels)} for these"
            )
        return FiniteScalarQuantizer(dim, fsq_levels)
    if kind == "lfq":
        if codebook_size < 2 or codebook_size & (codebook_size - 1):
            raise ConfigError(f"got {codebook_size} codes for 'lfq', expected a power of two")
        return LookupFreeQuantizer(dim, codebook_size)
    if kind == "simvq":
        return SimVQuantizer(dim, codebook_dim, codebook_size)
    return VectorQuantizer(dim, codebook_dim, codebook_size, levels, vectors_per_batch, cosine=kind == "cosine")


def _nearest_within(z: Tensor, entries: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    codes, sure = nearest_within(z.flatten(0, 1), entries, noise)
    return codes.view(*z.shape[:2], 1), sure.view(z.shape[:2])


def _same_on_both_sides(quantizer: Quantizer, z: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Where each channel is rounded by itself: a code stays if it is that of all raised, and of all lowered."""
    push = noise * z.norm(dim=-1, keepdim=True)
    codes, low, high = (quantizer.search(x, 1) for x in (z, z - push, z + push))
    return codes, ((codes == low) & (codes == high))[..., 0]


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over the ranks of a distributed run, with gradients; itself where there is one rank."""
    if not distributed():
        return x
    mean = sum_over_ranks(x.detach().clone()) / torch.distributed.get_world_size()
    # Every rank's gradients are averaged again by DDP: this rank's share of the mean counts in full.
    return x + (mean - x).detach()


def entropy(one: Tensor) -> Tensor:
    """Entropy in nats of bits that are 1 with chance ``one``."""
    one = one.clamp(1e-6, 1 - 1e-6)
    return -(one * one.log() + (1 - one) * (1 - one).log())
