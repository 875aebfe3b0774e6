"""Kernels for GPU (Triton) and TPU (Mosaic), interpreted on a CPU."""
