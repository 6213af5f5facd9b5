"""Training on many processes: one model, one batch, any number of processes."""
