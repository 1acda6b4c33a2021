"""A codebook whose entries are moving averages of the vectors that they stand for, in training and out of it.

van den Oord, Vinyals, Kavukcuoglu: Neural discrete representation learning (https://arxiv.org/abs/1711.00937), appendix
A.1, with dead codes revived from the batch (https://arxiv.org/abs/2005.00341, section 3.1). The step is that of
vector-quantize-pytorch's ``VectorQuantize``, without its matrices of vectors by codes: the search is
``mmtok.nearest``, the sums are scattered.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.errors import ConfigError
from mmtok.nearest import nearest

# A code is dead when it is drawn less than a tenth as often as if all were drawn alike. Relative, because an
# absolute threshold revives most of a codebook that is large for its batch.
DEAD_SHARE = 0.1
DECAY = 0.99
SMOOTHING = 1e-5  # added to every count (Laplace), so that none is zero


class Codebook(nn.Module):
    """Entries float32 [codes, dim] that follow the vectors which fall to them.

    In a distributed run counts and sums are those of all ranks, and what is drawn is drawn by rank 0, so that every
    rank has the same entries.

    Args:
        codes: number of entries.
        dim: channels.
        vectors_per_batch: how many vectors a training batch holds, over all ranks, for the count of a dead code.
        cosine: vectors and entries are on the unit sphere.
    """

    entries: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor

    def __init__(self, codes: int, dim: int, vectors_per_batch: int, cosine: bool = False) -> None:
        super().__init__()
        self.cosine, self.share = cosine, vectors_per_batch / codes
        self.register_buffer("entries", self.on_sphere(torch.randn(codes, dim) * dim**-0.5))
        self.register_buffer("counts", torch.full((codes,), self.share))
        self.register_buffer("sums", self.entries * self.share)
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def on_sphere(self, z: Tensor) -> Tensor:
        """Vectors [..., dim] at length 1 where the codebook is one of directions; else as they are."""
        return F.normalize(z, dim=-1) if self.cosine else z

    def search(self, z: Tensor) -> Tensor:
        """The nearest entry of each vector: float32 [..., dim] -> int64 [...]."""
        return nearest(z.flatten(0, -2), self.entries).view(z.shape[:-1])

    @torch.no_grad()
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors float32 [B, N, dim] -> their entries [B, N, dim] and codes int64 [B, N], both without gradients.

        In training mode the entries move after it, and the first call starts them.
        """
        flat = z.flatten(0, -2)
        if self.training and not self.started:
            self.start(flat)
        codes = self.search(flat)
        quantized = self.entries[codes]
        if self.training:
            self._follow(flat, codes)
        return quantized.view(z.shape), codes.view(z.shape[:-1])

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """Start the entries at the k-means centres of vectors float32 [n, dim]; of rank 0's, in a distributed run.

        With fewer vectors than entries, the entries start at vectors drawn from them, some several times.
        """
        codes = len(self.entries)
        few = len(vectors) < codes
        centres = vectors[torch.randint(len(vectors), (codes,)).to(vectors.device)] if few else k_means(vectors, codes)
        self.entries.copy_(_from_rank_0(self.on_sphere(centres)))
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Start counts and sums from the entries, as if all were drawn alike.

        For training on from stored entries: from sums of zero, one step would pull every entry to the origin.
        """
        self.counts.fill_(self.share)
        self.sums.copy_(self.entries * self.share)
        self.started.fill_(True)

    @torch.no_grad()
    def _follow(self, vectors: Tensor, codes: Tensor) -> None:
        counts = torch.bincount(codes, minlength=len(self.entries)).to(self.counts)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        self.counts.lerp_(sum_over_ranks(counts), 1 - DECAY)
        self.sums.lerp_(sum_over_ranks(sums), 1 - DECAY)
        total = self.counts.sum()
        smooth = (self.counts + SMOOTHING) / (total + len(self.counts) * SMOOTHING) * total
        self.entries.copy_(self.on_sphere(self.sums / smooth[:, None]))
        least = DEAD_SHARE * self.share
        dead = self.counts < least
        if dead.any():
            anew = vectors[torch.randint(len(vectors), (int(dead.sum()),)).to(vectors.device)]
            self.entries[dead] = anew = _from_rank_0(anew)
            self.counts[dead] = least
            self.sums[dead] = anew * least


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


def distributed() -> bool:
    """Whether this process is one of several that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over the ranks of a distributed run, in place; itself where there is one process."""
    if distributed():
        torch.distributed.all_reduce(x)
    return x


def _from_rank_0(x: Tensor) -> Tensor:
    """Rank 0's tensor, in place."""
    x = x.contiguous()
    if distributed():
        torch.distributed.broadcast(x, 0)
    return x
