"""Quantised formats of experts: layouts, encoders and kernels that compute from them."""
