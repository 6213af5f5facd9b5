"""What to train for a training budget and serving limits, by published or fitted scaling laws."""
