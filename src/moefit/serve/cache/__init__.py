"""Which experts are in memory: slots, the slot table, eviction and swaps."""
