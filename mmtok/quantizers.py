"""One interface over vector-quantize-pytorch: vectors -> codes -> vectors.

    name     class                  codebook                                 paper
    vq       VectorQuantizer        moving averages of what a code stands    https://arxiv.org/abs/1711.00937, appendix A.1
                                    for, levels of residuals if wanted       https://arxiv.org/abs/2107.03312
    cosine   VectorQuantizer        the same on the unit sphere              https://arxiv.org/abs/2110.04627
    simvq    SimVQuantizer          fixed noise through a learnt matrix      https://arxiv.org/abs/2411.02038
    fsq      FiniteScalarQuantizer  rounding of a few bounded channels       https://arxiv.org/abs/2309.15505
    lfq      LookupFreeQuantizer    signs of channels on the unit sphere     https://arxiv.org/abs/2406.07548

``build_quantizer`` makes one by its name. All of them project to a few channels first, because codes are searched
better in a low dimension, and back after. The library trains the codebooks; which code a vector has is decided by
``mmtok.nearest``, by rounding or by a sign, never by anything else in the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ, LFQ, SimVQ, VectorQuantize

from mmtok.errors import ConfigError, VocabularyError
from mmtok.nearest import nearest

# A code is dead when it is drawn less than a tenth as often as if all were drawn alike. Relative, because an
# absolute threshold revives most of a codebook that is large for its batch.
DEAD_SHARE = 0.1
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

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors float32 [B, N, dim] of codes int64 [B, N, L], where L is any number of levels from the first.

        Raises:
            VocabularyError: a code is outside the codebook, or there are more levels than codebooks.
        """
        sizes = self.codebook_sizes
        if not 1 <= codes.shape[-1] <= len(sizes):
            raise VocabularyError(f"got codes of {codes.shape[-1]} levels, expected 1 to {len(sizes)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < sizes[0]:
            raise VocabularyError(f"got codes from {int(codes.min())} to {int(codes.max())}, expected 0 to {sizes[0] - 1}")
        return self.project_out(self.vectors(codes))

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Start the codebooks from vectors float [n, dim], n at least the codes of a level; nothing where none is learnt."""

    def restart_averages(self) -> None:
        """Start what only training needs from the codebooks, as if all codes were drawn alike."""

    @abstractmethod
    def _train(self, z: Tensor, levels: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """float32 [B, N, codebook_dim] -> (quantized with gradients, codes [B, N, levels], loss)."""

    @abstractmethod
    def search(self, z: Tensor, levels: int | None) -> Tensor:
        """Codes int64 [B, N, levels] of vectors float32 [B, N, codebook_dim] in the space of the codebook."""

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
        self.vectors_per_batch, self.cosine = vectors_per_batch, cosine
        self.levels = nn.ModuleList(
            VectorQuantize(
                dim=codebook_dim,
                codebook_size=codebook_size,
                decay=0.99,
                kmeans_init=True,
                kmeans_iters=10,
                threshold_ema_dead_code=DEAD_SHARE * vectors_per_batch / codebook_size,
                use_cosine_sim=cosine,
                rotation_trick=False,
                commitment_weight=1.0,
            )
            for _ in range(levels)
        )

    def codebooks(self) -> list[Tensor]:
        """The codebooks, float32 [codebook_size, codebook_dim] each."""
        return [level._codebook.embed[0].float() for level in self.levels]  # type: ignore[union-attr,index]

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Start every level at the k-means centres of vectors float [n, dim], or of what the levels before leave of them."""
        residual = self._direction(self.project_in(z.float()))
        for level in self.levels:
            book = level._codebook
            centres = k_means(residual, book.codebook_size)  # type: ignore[union-attr]
            book.embed.copy_(self._direction(centres)[None])  # type: ignore[union-attr,operator]
            book.initted.fill_(True)  # type: ignore[union-attr,operator]
            residual = residual - book.embed[0][nearest(residual, book.embed[0])]  # type: ignore[union-attr,index]
        self.restart_averages()

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Start the averages behind the codebooks from the codebooks, as if all codes were drawn alike.

        For training on from stored codebooks: from averages of zero, one step would pull every code to the origin.
        """
        for level, size in zip(self.levels, self.codebook_sizes, strict=True):
            book = level._codebook
            book.cluster_size.fill_(self.vectors_per_batch / size)  # type: ignore[union-attr,operator]
            book.embed_avg.copy_(book.embed * book.cluster_size[..., None])  # type: ignore[union-attr,operator,index]

    def _direction(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.cosine else z

    def _train(self, z: Tensor, levels: int | None) -> tuple[Tensor, Tensor, Tensor]:
        z = self._direction(z)
        residual, total, loss, codes = z, torch.zeros_like(z), z.new_zeros(()), []
        for level in list(self.levels)[:levels]:
            quantized, index, commitment = level(residual)
            quantized = quantized.detach()
            residual, total, loss = residual - quantized, total + quantized, loss + commitment.sum()
            codes.append(index)
        return z + (total - z).detach(), torch.stack(codes, -1), COMMITMENT * loss / len(codes)

    def search(self, z: Tensor, levels: int | None) -> Tensor:
        residual, codes = self._direction(z), []
        for codebook in self.codebooks()[:levels]:
            index = nearest(residual.flatten(0, 1), codebook).view(residual.shape[:2])
            residual = residual - codebook[index]
            codes.append(index)
        return torch.stack(codes, -1)

    def vectors(self, codes: Tensor) -> Tensor:
        books = self.codebooks()
        return sum((books[i][codes[..., i]] for i in range(1, codes.shape[-1])), books[0][codes[..., 0]])


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
        codebook_dim: channels in which codes are searched; ``fsq`` has one a value of ``fsq_levels``, ``lfq`` one a bit.
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


def k_means(vectors: Tensor, k: int, iterations: int = 10) -> Tensor:
    """Centres float32 [k, d] of float32 [n, d] by Lloyd's algorithm from k vectors drawn by torch's generator.

    A centre that loses all its vectors is put on a vector drawn anew.

    Raises:
        ConfigError: fewer vectors than centres.
    """
    if len(vectors) < k:
        raise ConfigError(f"got {len(vectors)} vectors for {k} codes, expected at least as many: give more batches")
    centres = vectors[torch.randperm(len(vectors))[:k].to(vectors.device)].clone()
    for _ in range(iterations):
        index = nearest(vectors, centres)
        count = torch.bincount(index, minlength=k)
        total = torch.zeros_like(centres).index_add_(0, index, vectors)
        anew = vectors[torch.randint(len(vectors), (k,)).to(vectors.device)]
        centres = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], anew)
    return centres


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over the ranks of a distributed run, with gradients; itself where there is one rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    mean = x.detach().clone()
    torch.distributed.all_reduce(mean)
    mean /= torch.distributed.get_world_size()
    # Every rank's gradients are averaged again by DDP: this rank's share of the mean counts in full.
    return x + (mean - x).detach()


def entropy(one: Tensor) -> Tensor:
    """Entropy in nats of bits that are 1 with chance ``one``."""
    one = one.clamp(1e-6, 1 - 1e-6)
    return -(one * one.log() + (1 - one) * (1 - one).log())
