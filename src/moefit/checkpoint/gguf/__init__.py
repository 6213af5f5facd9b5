"""Read GGUF files as checkpoints: header, types of weights, families and tokenizers."""
