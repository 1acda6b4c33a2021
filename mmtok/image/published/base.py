"""What the published image tokenizers have in common."""

from __future__ import annotations

from mmtok.image.tokenizer import ImageTokenizer
from mmtok.published import Published


class PublishedTokenizer(Published, ImageTokenizer):
    """An image tokenizer that somebody else trained.

    Normalisation and attention look at the whole picture, so that there are no tiles: memory grows with the picture.
    """
