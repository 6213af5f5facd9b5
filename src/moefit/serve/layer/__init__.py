"""One MoE layer while it is served: executor, rerouting, router probe."""
