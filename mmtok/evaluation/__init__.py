"""Metrics and baselines of the tokenizers."""
