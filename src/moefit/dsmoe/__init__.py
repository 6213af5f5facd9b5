"""The DS-MoE architecture: configuration, model, attention and losses."""
