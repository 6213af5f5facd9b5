"""Many requests on one served model: continuous batching inside the memory budget."""
