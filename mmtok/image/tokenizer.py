"""What all image tokenizers share: pictures of any size, with or without alpha, in batches, lists and tiles.

A subclass gives a network that maps one picture whose sides are multiples of ``downsample`` to codes and back
(``to_codes``, ``to_pixels``); ``ImageTokenizer`` brings any picture there:

size    -- padded with its last row and column to a multiple of ``downsample``; ``decode`` crops back exactly
alpha   -- composited on a stated colour, or kept by tokenizers of four channels
batch   -- a picture's codes are those that it has alone. Small pictures of one size share a pass of the network where
           that cannot change a code; those that have a near tie go through it again alone
tiles   -- large pictures piece by piece with a halo as wide as the network sees, so that codes and pixels are those
           of the whole at a memory that does not grow with the picture
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.codec import exact
from mmtok.errors import MediaError, VocabularyError

TILE = 512  # pixels: pictures with a longer side go through the network in squares of this side, and the halo
WHITE = (255, 255, 255)
TOGETHER = 2**17  # pixels that share a pass of the network: larger batches are no quicker and take more memory
# How far a vector of the network may be off, as a share of its length, when it is computed in another batch: more than
# twice what was seen (2e-6).
NOISE = 5e-6
Size = tuple[int, int]


class ImageTokenizer(nn.Module, ABC):
    """Encode uint8 pictures to codes and decode codes to uint8 pictures.

    Attributes:
        modality: ``image``.
        channels: of the pictures it decodes to: 3 for RGB, 4 for RGBA.
        halo: how many pixels around a picture's piece its codes depend on, a multiple of ``downsample``; None where
            they depend on the whole picture (a layer that attends or normalises over it): no tiles then.
        decode_halo: the same for pixels, in codes.
    """

    modality = "image"
    channels: int = 3
    halo: int | None = None
    decode_halo: int | None = None

    @property
    @abstractmethod
    def downsample(self) -> int:
        """Pixels that a code spans on each side."""

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes in each codebook: one, or one for each level of a residual quantizer, coarse to fine."""

    @abstractmethod
    def to_codes(self, pixels: Tensor) -> Tensor:
        """float32 [1, channels, H, W] in -1..1, H and W multiples of ``downsample`` -> int64 [1, h, w, levels]."""

    @abstractmethod
    def to_pixels(self, codes: Tensor) -> Tensor:
        """int64 [1, h, w, levels], codes in range -> float32 [1, channels, h * downsample, w * downsample]."""

    def to_codes_together(self, pixels: Tensor) -> tuple[Tensor, Tensor] | None:
        """As ``to_codes`` for [B, channels, H, W], and bool [B]: which pictures surely have the codes they have alone.

        None where a batch gives nothing that can be relied on.
        """
        return None

    @property
    def properties(self) -> dict[str, int]:
        """What the registry keeps of this tokenizer: ``downsample``, in pixels."""
        return {"downsample": self.downsample}

    @overload
    def encode(self, pixels: Tensor, background: tuple[int, int, int] = ..., tile: int | None = ...) -> Tensor: ...
    @overload
    def encode(
        self, pixels: Sequence[Tensor], background: tuple[int, int, int] = ..., tile: int | None = ...
    ) -> list[Tensor]: ...
    def encode(
        self, pixels: Tensor | Sequence[Tensor], background: tuple[int, int, int] = WHITE, tile: int | None = TILE
    ) -> Tensor | list[Tensor]:
        """Codes of pictures.

        Args:
            pixels: uint8 [B, 3, H, W] or [B, 4, H, W] (RGBA, not premultiplied) of any H and W from 1, or a sequence
                of pictures [3 or 4, H, W] of different sizes.
            background: the colour, 0..255 each, on which a tokenizer of three channels composites RGBA.
            tile: side of the squares in which pictures with a longer side are encoded, in pixels; None for the whole
                at once. It changes the memory that is needed; codes are equal but for near ties.

        Returns:
            int64 [B, h, w] with h = ceil(H / downsample) and w likewise, [B, h, w, levels] of a residual quantizer;
            for a sequence a list of int64 [h, w] or [h, w, levels].

        Raises:
            MediaError: wrong dtype or shape, a background that is no colour, or a tile below 1.
        """
        if tile is not None and tile < 1:
            raise MediaError(f"got a tile of {tile} pixels, expected at least 1, or None for whole pictures")
        if isinstance(pixels, Tensor):
            if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (3, 4):
                raise MediaError(f"got {pixels.dtype} {list(pixels.shape)}, expected uint8 [B, 3 or 4, H, W]")
            self._check_sides(pixels.shape[2:])
            if not len(pixels):
                h, w = self.grid((pixels.shape[2], pixels.shape[3]))
                return self._flat(torch.zeros(0, h, w, len(self.codebook_sizes), dtype=torch.int64))
            return self._flat(self._encode_several(pixels, background, tile))
        for i, x in enumerate(pixels):
            if not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.ndim != 3 or x.shape[0] not in (3, 4):
                got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise MediaError(f"picture {i} is {got}, expected uint8 [3 or 4, H, W]")
            self._check_sides(x.shape[1:])
        same: dict[torch.Size, list[int]] = {}
        for i, x in enumerate(pixels):
            same.setdefault(x.shape, []).append(i)
        found: dict[int, Tensor] = {}
        for rows in same.values():
            codes = self._flat(self._encode_several(torch.stack([pixels[i] for i in rows]), background, tile))
            found |= dict(zip(rows, codes, strict=True))
        return [found[i] for i in range(len(pixels))]

    @overload
    def decode(self, codes: Tensor, size: Size | None = ..., tile: int | None = ...) -> Tensor: ...
    @overload
    def decode(
        self, codes: Sequence[Tensor], size: Sequence[Size] | None = ..., tile: int | None = ...
    ) -> list[Tensor]: ...
    def decode(
        self, codes: Tensor | Sequence[Tensor], size: Size | Sequence[Size] | None = None, tile: int | None = TILE
    ) -> Tensor | list[Tensor]:
        """Pictures of codes.

        Args:
            codes: int64 [B, h, w], of a residual quantizer [B, h, w, L] with L any number of levels from the first;
                or a sequence of [h, w] or [h, w, L].
            size: (H, W) of the pictures that were encoded, for a sequence one of each: the padding is cut off. None
                keeps it.
            tile: as for ``encode``.

        Returns:
            uint8 [B, channels, H, W], or a list of uint8 [channels, H, W].

        Raises:
            VocabularyError: wrong dtype or shape, or a code outside its codebook.
            MediaError: a size that the codes are not of, or a tile below 1.
        """
        if tile is not None and tile < 1:
            raise MediaError(f"got a tile of {tile} pixels, expected at least 1, or None for whole pictures")
        if isinstance(codes, Tensor):
            whole = self._levelled(codes)
            one = self._checked_size(whole, size)
            if not len(whole):
                f = self.downsample
                height, width = one or (whole.shape[1] * f, whole.shape[2] * f)
                return torch.zeros(0, self.channels, height, width, dtype=torch.uint8)
            return torch.cat([self._decode(x[None], one, tile) for x in whole])
        sizes = [None] * len(codes) if size is None else list(size)
        if len(sizes) != len(codes):
            raise MediaError(f"got {len(sizes)} sizes for {len(codes)} pictures, expected one of each")
        rows = [self._levelled(x[None]) for x in codes]
        checked = [self._checked_size(row, one) for row, one in zip(rows, sizes, strict=True)]
        return [self._decode(row, one, tile)[0] for row, one in zip(rows, checked, strict=True)]

    def grid(self, size: Size) -> Size:
        """(h, w): how many codes a picture of (H, W) pixels has."""
        return -(-size[0] // self.downsample), -(-size[1] // self.downsample)

    # --- encode and decode

    @exact
    def _encode_several(self, pixels: Tensor, background: tuple[int, int, int], tile: int | None) -> Tensor:
        """uint8 [B, 3 or 4, H, W], B at least 1 -> int64 [B, h, w, levels]."""
        height, width = pixels.shape[2:]
        several, f = TOGETHER // (height * width), self.downsample
        h, w = self.grid((height, width))
        out: list[Tensor] = []
        for part in pixels.split(max(1, several)):
            whole = tile is None or max(height, width) <= tile
            together = (
                self.to_codes_together(self._input(part, h * f, w * f, background)) if len(part) > 1 and whole else None
            )
            if together is None:
                out += [self._encode(x[None], background, tile) for x in part]
            else:
                codes, sure = together
                for i in (~sure).nonzero()[:, 0].tolist():
                    codes[i] = self._encode(part[i : i + 1], background, tile)[0]
                out.append(codes)
        return torch.cat(out)

    @exact
    def _encode(self, pixels: Tensor, background: tuple[int, int, int], tile: int | None) -> Tensor:
        """uint8 [1, 3 or 4, H, W] -> int64 [1, h, w, levels]."""
        f = self.downsample
        height, width = pixels.shape[2:]

        def piece(top: int, bottom: int, left: int, right: int) -> Tensor:
            x = pixels[:, :, top : min(bottom, height), left : min(right, width)]
            return self.to_codes(self._input(x, bottom - top, right - left, background))

        h, w = self.grid((height, width))
        halo = None if self.halo is None else self.halo // f
        return in_tiles(piece, h, w, f, 1, None if tile is None else -(-tile // f), halo)

    @exact
    def _decode(self, codes: Tensor, size: Size | None, tile: int | None) -> Tensor:
        """int64 [1, h, w, levels] -> uint8 [1, channels, H, W]."""
        f = self.downsample
        device = next(self.parameters()).device

        def piece(top: int, bottom: int, left: int, right: int) -> Tensor:
            y = self.to_pixels(codes[:, top:bottom, left:right].to(device))
            y = ((y.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            return y.permute(0, 2, 3, 1)

        h, w = codes.shape[1:3]
        y = in_tiles(piece, h, w, 1, f, None if tile is None else -(-tile // f), self.decode_halo).permute(0, 3, 1, 2)
        return (y if size is None else y[:, :, : size[0], : size[1]]).contiguous()

    def _input(self, pixels: Tensor, height: int, width: int, background: tuple[int, int, int]) -> Tensor:
        """uint8 [B, 3 or 4, ., .] -> float32 [B, channels, height, width] in -1..1, on the device of the weights."""
        x = match_channels(pixels.to(next(self.parameters()).device), self.channels, background)
        return pad_edge(x.float() / 127.5 - 1, height, width)

    # --- checks and shapes

    def _flat(self, codes: Tensor) -> Tensor:
        """Without the axis of levels where there is one level."""
        return codes[..., 0] if len(self.codebook_sizes) == 1 else codes

    def _levelled(self, codes: Tensor) -> Tensor:
        """With the axis of levels, checked."""
        sizes = self.codebook_sizes
        shape = "[B, h, w]" if len(sizes) == 1 else "[B, h, w, levels]"
        if codes.dtype != torch.int64 or codes.ndim != (3 if len(sizes) == 1 else 4):
            raise VocabularyError(f"got codes {codes.dtype} {list(codes.shape)}, expected int64 {shape}")
        codes = codes[..., None] if len(sizes) == 1 else codes
        if not codes.shape[1] or not codes.shape[2]:
            raise VocabularyError(f"got codes {list(codes.shape[:3])}, expected at least one code a side")
        if not 1 <= codes.shape[3] <= len(sizes):
            raise VocabularyError(f"got codes of {codes.shape[3]} levels, expected 1 to {len(sizes)}")
        for level in range(codes.shape[3]):
            c = codes[..., level]
            if c.numel() and not 0 <= int(c.min()) <= int(c.max()) < sizes[level]:
                raise VocabularyError(
                    f"got codes from {int(c.min())} to {int(c.max())}, expected 0 to {sizes[level] - 1}"
                )
        return codes

    def _check_sides(self, sides: Sequence[int]) -> None:
        if min(sides) < 1:
            raise MediaError(f"got a picture of {sides[0]}x{sides[1]} pixels, expected at least 1 a side")

    def _checked_size(self, codes: Tensor, size: Any) -> Size | None:
        if size is None:
            return None
        h, w = codes.shape[1:3]
        if len(size) != 2 or self.grid((int(size[0]), int(size[1]))) != (h, w):
            f = self.downsample
            raise MediaError(
                f"got a size of {'x'.join(map(str, size))} pixels for {h}x{w} codes, expected "
                f"{(h - 1) * f + 1}..{h * f} by {(w - 1) * f + 1}..{w * f}"
            )
        return int(size[0]), int(size[1])


def match_channels(pixels: Tensor, channels: int, background: tuple[int, int, int] = WHITE) -> Tensor:
    """uint8 [B, 3 or 4, H, W] with ``channels`` channels: RGBA composited on ``background``, or an opaque alpha added.

    Compositing rounds to the nearest of 0..255, as the "over" operator of Porter and Duff (SIGGRAPH 1984) on an opaque
    backdrop.

    Raises:
        MediaError: a background that is not three whole numbers in 0..255.
    """
    if len(background) != 3 or not all(isinstance(x, int) and 0 <= x <= 255 for x in background):
        raise MediaError(f"got the background {background!r}, expected three whole numbers in 0..255, such as {WHITE}")
    if pixels.shape[1] == channels:
        return pixels
    if channels == 4:
        return torch.cat([pixels, torch.full_like(pixels[:, :1], 255)], 1)
    alpha = pixels[:, 3:].int()
    backdrop = torch.tensor(background, dtype=torch.int32, device=pixels.device)[:, None, None]
    return ((pixels[:, :3].int() * alpha + backdrop * (255 - alpha) + 127) // 255).to(torch.uint8)


def pad_edge(x: Tensor, height: int, width: int) -> Tensor:
    """float [B, C, H, W] enlarged at the bottom and the right by its last row and column."""
    if x.shape[2:] == (height, width):
        return x
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), mode="replicate")


def in_tiles(
    piece: Callable[[int, int, int, int], Tensor],
    h: int,
    w: int,
    into: int,
    out: int,
    tile: int | None,
    halo: int | None,
) -> Tensor:
    """A map over a grid, computed tile by tile.

    Args:
        piece: (top, bottom, left, right), in units of its input -> the map there, [1, rows, columns, channels].
        h, w: size of the grid, in codes.
        into, out: a code's units of input, and of output.
        tile: side of a tile, in codes; None for all at once.
        halo: codes around a tile that the map depends on; None if on all.
    """
    if tile is None or halo is None or max(h, w) <= tile:
        return piece(0, h * into, 0, w * into)
    whole: Tensor | None = None
    for (top, bottom), (left, right) in ((a, b) for a in _spans(h, tile) for b in _spans(w, tile)):
        t, b, lft, r = max(0, top - halo), min(h, bottom + halo), max(0, left - halo), min(w, right + halo)
        y = piece(t * into, b * into, lft * into, r * into)
        if whole is None:
            whole = y.new_empty(1, h * out, w * out, y.shape[3])
        y = y[:, (top - t) * out : (bottom - t) * out, (left - lft) * out : (right - lft) * out]
        whole[:, top * out : bottom * out, left * out : right * out] = y
    assert whole is not None
    return whole


def _spans(length: int, tile: int) -> Iterator[tuple[int, int]]:
    return ((i, min(length, i + tile)) for i in range(0, length, tile))
