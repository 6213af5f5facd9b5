"""Checkpoints on disk: safetensors files, and where each expert's bytes are."""
