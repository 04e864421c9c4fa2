"""What a residual connection goes around."""
