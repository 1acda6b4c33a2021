"""Text subword models."""

from mmtok.text.bpe import ByteLevelBPE as ByteLevelBPE
from mmtok.text.bytelevel import ByteLevelTokenizer as ByteLevelTokenizer
from mmtok.text.bytelevel import StreamDecoder as StreamDecoder
from mmtok.text.bytelevel import TextTokenizer as TextTokenizer
from mmtok.text.unigram import ByteLevelUnigram as ByteLevelUnigram
