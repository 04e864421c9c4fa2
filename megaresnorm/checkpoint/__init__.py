"""Checkpoints: tensors in safetensors, everything else in one JSON manifest; no pickle anywhere."""
