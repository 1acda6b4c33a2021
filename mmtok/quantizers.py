"""One interface over vector-quantize-pytorch: vectors -> codes -> vectors, one level or residual.

Residual vector quantization as in SoundStream (https://arxiv.org/abs/2107.03312), each level an EMA codebook
(VQ-VAE, https://arxiv.org/abs/1711.00937, appendix A.1) in a low dimension (ViT-VQGAN, https://arxiv.org/abs/2110.04627)
with dead codes revived from the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from mmtok.errors import VocabularyError

# A code is dead when it is drawn less than a tenth as often as if all were drawn alike. Relative, because an
# absolute threshold revives most of a codebook that is large for its batch.
DEAD_SHARE = 0.1


class Quantizer(nn.Module):
    """Projects to ``codebook_dim``, quantizes in ``levels`` residual steps, projects back.

    Args:
        dim: channels of the vectors.
        codebook_dim: channels in which codes are searched.
        codebook_size: codes a level.
        levels: residual levels; 1 is plain vector quantization.
        vectors_per_batch: how many vectors a training batch holds, for the threshold under which a code is revived.
    """

    def __init__(
        self, dim: int, codebook_dim: int, codebook_size: int, levels: int = 1, vectors_per_batch: int = 4096
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.vectors_per_batch = vectors_per_batch
        self.project_in = nn.Linear(dim, codebook_dim)
        self.project_out = nn.Linear(codebook_dim, dim)
        self.levels = nn.ModuleList(
            VectorQuantize(
                dim=codebook_dim,
                codebook_size=codebook_size,
                decay=0.99,
                kmeans_init=True,
                kmeans_iters=10,
                threshold_ema_dead_code=DEAD_SHARE * vectors_per_batch / codebook_size,
                rotation_trick=False,
                commitment_weight=1.0,
            )
            for _ in range(levels)
        )

    def forward(self, z: Tensor, levels: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize with straight-through gradients; in training mode the codebooks move.

        Args:
            z: float [B, N, dim].
            levels: use only the first so many levels (quantizer dropout).

        Returns:
            (float [B, N, dim], codes int64 [B, N, levels], commitment loss, a scalar).
        """
        with torch.autocast(z.device.type, enabled=False):
            z = self.project_in(z.float())
            residual, total, loss, codes = z, torch.zeros_like(z), z.new_zeros(()), []
            for level in list(self.levels)[:levels]:
                quantized, index, commitment = level(residual)
                quantized = quantized.detach()
                residual, total, loss = residual - quantized, total + quantized, loss + commitment.sum()
                codes.append(index)
            straight_through = z + (total - z).detach()
            return self.project_out(straight_through), torch.stack(codes, -1), loss / len(codes)

    @torch.no_grad()
    def encode(self, z: Tensor, levels: int | None = None) -> Tensor:
        """Codes int64 [B, N, levels] of float [B, N, dim]; changes no state in any mode.

        The search is the plain one: squared distance in float32, ties to the lowest index.
        """
        residual, codes = self.project_in(z.float()), []
        for codebook in self.codebooks()[:levels]:
            distance = codebook.square().sum(-1) - 2 * residual @ codebook.T
            index = distance.argmin(-1)
            residual = residual - codebook[index]
            codes.append(index)
        return torch.stack(codes, -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors float32 [B, N, dim] of codes int64 [B, N, L], where L is any number of levels from the first.

        Raises:
            VocabularyError: a code is outside the codebook, or there are more levels than codebooks.
        """
        books = self.codebooks()
        if not 1 <= codes.shape[-1] <= len(books):
            raise VocabularyError(f"got codes of {codes.shape[-1]} levels, expected 1 to {len(books)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise VocabularyError(
                f"got codes from {int(codes.min())} to {int(codes.max())}, expected 0 to {self.codebook_size - 1}"
            )
        total = sum(books[i][codes[..., i]] for i in range(codes.shape[-1]))
        return self.project_out(total)

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Start the averages behind the codebooks from the codebooks, as if all codes were drawn alike.

        For training on from stored codebooks: from averages of zero, one step would pull every code to the origin.
        """
        for level in self.levels:
            book = level._codebook
            book.cluster_size.fill_(self.vectors_per_batch / self.codebook_size)  # type: ignore[union-attr,operator]
            book.embed_avg.copy_(book.embed * book.cluster_size[..., None])  # type: ignore[union-attr,operator,index]

    def codebooks(self) -> list[Tensor]:
        """The codebooks, float32 [codebook_size, codebook_dim] each."""
        return [level._codebook.embed[0].float() for level in self.levels]  # type: ignore[union-attr,index]
