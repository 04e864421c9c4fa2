"""Plain PyTorch to read: no torch.distributed, and no branch on the name of a topology."""
