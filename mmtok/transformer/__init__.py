"""The reference transformer: decoder, key-value cache, packing, sampling and grammar-constrained generation."""

from mmtok.transformer.generate import Generation as Generation
from mmtok.transformer.generate import Request as Request
from mmtok.transformer.generate import generate as generate
from mmtok.transformer.model import Transformer as Transformer
from mmtok.transformer.model import TransformerConfig as TransformerConfig
from mmtok.transformer.sampling import Sampling as Sampling
