"""mmtok: one vocabulary for text, images and audio."""

from mmtok.documents import Audio as Audio
from mmtok.documents import Document as Document
from mmtok.documents import Image as Image
from mmtok.documents import Text as Text
from mmtok.documents import Turn as Turn
from mmtok.loading import load as load
from mmtok.multimodal import MultimodalTokenizer as MultimodalTokenizer
from mmtok.registry import VocabularyRegistry as VocabularyRegistry

__version__ = "0.1.0"
