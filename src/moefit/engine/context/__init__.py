"""The size of the KV cache, which follows what requests need."""
