"""The planner: what a memory budget costs and gains, before it is paid."""
