"""Audio codecs."""

from mmtok.audio.codec import SpectralCodec as SpectralCodec
from mmtok.audio.codec import SpectralCodecConfig as SpectralCodecConfig
