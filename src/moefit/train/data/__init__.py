"""Training data: sources, documents, split, tokenizer, token files, batches."""
