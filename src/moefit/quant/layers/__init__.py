"""Kernels of whole layers of a model."""
