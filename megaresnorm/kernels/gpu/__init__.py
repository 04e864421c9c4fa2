"""Kernels in Triton for NVIDIA GPUs. Only the files of kernels import triton, and those when one is first run."""
