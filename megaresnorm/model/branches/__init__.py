"""The branches F that a residual connection goes around."""
