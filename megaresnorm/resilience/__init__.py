"""Signals, restarts, locks and checks that keep a run alive, or end it in order."""
