"""The model in plain PyTorch, to be read: no torch.distributed, and no decision by the name of a topology."""
