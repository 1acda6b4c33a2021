"""The reference transformer: decoder, key-value cache, packing, sampling and grammar-constrained generation."""
