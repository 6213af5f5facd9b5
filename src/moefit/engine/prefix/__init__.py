"""Reuse of keys and values between requests whose prompts begin with the same tokens."""
