"""One op closes a residual connection and opens the next; a backend is one entry of the registry."""
