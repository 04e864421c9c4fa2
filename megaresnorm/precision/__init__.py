"""Number formats, and products in another one than the weights are stored in."""
