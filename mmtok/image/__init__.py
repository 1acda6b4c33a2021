"""Image tokenizers."""

from mmtok.image.tokenizer import ImageTokenizer as ImageTokenizer
from mmtok.image.tokenizer import match_channels as match_channels
from mmtok.image.vqvae import ImageVQVAE as ImageVQVAE
from mmtok.image.vqvae import ImageVQVAEConfig as ImageVQVAEConfig
from mmtok.image.vqvae import premultiply as premultiply
