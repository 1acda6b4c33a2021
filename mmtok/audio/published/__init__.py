"""Audio codecs that others trained and published, from local files, behind the protocol of mmtok's own.

``from_published`` of each reads what was published; ``save`` then writes a checkpoint of mmtok's, which ``mmtok.load``
reads. ``SYSTEMS`` names them.
"""

from __future__ import annotations

from mmtok.audio.published.base import PublishedCodec as PublishedCodec
from mmtok.audio.published.dac import DAC as DAC
from mmtok.audio.published.mimi import Mimi as Mimi
from mmtok.audio.published.snac import SNAC as SNAC
from mmtok.audio.published.xcodec import XCodec as XCodec

SYSTEMS: dict[str, type[PublishedCodec]] = {"dac": DAC, "mimi": Mimi, "snac": SNAC, "xcodec": XCodec}
