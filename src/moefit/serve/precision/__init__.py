"""Formats of experts that differ by importance and change while the model runs."""
