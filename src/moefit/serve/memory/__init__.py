"""The memory budget of a served model, and the estimate of its parts."""
