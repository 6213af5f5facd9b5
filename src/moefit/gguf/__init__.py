"""Write checkpoints as GGUF files, which llama.cpp loads."""
