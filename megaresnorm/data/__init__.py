"""From text to batches: corpus -> tokenizer -> .bin/.idx (prepare), and .bin/.idx -> samples -> batches (training)."""
