"""Parallelism: all code that knows of more than one rank. It takes plain values, never a recipe."""
