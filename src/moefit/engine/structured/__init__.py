"""Grammars that restrict what a request may generate."""
