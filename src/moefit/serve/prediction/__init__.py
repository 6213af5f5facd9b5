"""Predict which experts later layers will choose, and load them early."""
