"""Kernels for NVIDIA GPUs beside those of add_norm: our own, and those of other packages."""
