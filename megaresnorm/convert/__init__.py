"""Checkpoints to and from the formats of Hugging Face Transformers and Megatron-Core."""
