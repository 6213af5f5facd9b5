"""Dense training: text to tokens, the loop, checkpoints that resume exactly."""
