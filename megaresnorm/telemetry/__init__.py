"""Output of a run for people: its description, console log and metrics."""
