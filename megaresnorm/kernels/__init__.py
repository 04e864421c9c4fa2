"""Pure tensor functions on plain values: no torch.distributed, no recipe."""
