"""Kernels in C for CPUs: plain loops that the compiler turns into vectors."""
