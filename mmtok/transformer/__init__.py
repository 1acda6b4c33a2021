"""The reference transformer: decoder, key-value cache, packing, sampling and grammar-constrained generation."""

from __future__ import annotations
