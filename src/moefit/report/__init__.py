"""One page about training runs and models, and uploading it with the model."""
