"""Formats of quantised checkpoints: which tensors make up a weight, and what its values are."""
