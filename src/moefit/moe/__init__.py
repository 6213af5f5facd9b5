"""The mathematics of a MoE block, shared by training and serving."""
