"""The planner: predict what a memory budget costs, and choose a configuration."""
