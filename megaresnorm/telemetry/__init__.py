"""What a run says of itself: console, metrics, depth probes."""
