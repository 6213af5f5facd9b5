"""Serving: off-the-shelf MoE models inside a memory budget (SwapMoE, arXiv 2308.15030)."""
