"""Continuous batching: run many requests through one model inside the memory budget."""
