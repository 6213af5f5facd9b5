"""The rest of a transformers model: skeleton, KV cache, quantised dense weights."""
