"""Structured output of requests."""
