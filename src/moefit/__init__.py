"""Mixture-of-experts language models in the memory people have."""

__version__ = "0.1.0"
