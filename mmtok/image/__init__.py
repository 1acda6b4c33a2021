"""Image tokenizers."""

from mmtok.image.tokenizer import ImageTokenizer as ImageTokenizer
from mmtok.image.vqvae import ImageVQVAE as ImageVQVAE
from mmtok.image.vqvae import ImageVQVAEConfig as ImageVQVAEConfig
