"""Number formats, and products in a format other than the one that weights are stored in."""
