"""A run as one HTML page: curves, depth over time, profile, several runs side by side."""
