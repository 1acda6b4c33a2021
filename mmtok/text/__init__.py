"""Text subword models."""

from mmtok.text.bpe import ByteLevelBPE as ByteLevelBPE
from mmtok.text.bpe import StreamDecoder as StreamDecoder
