"""Simulate how a layer's experts are divided between a GPU and the memory that holds them."""
