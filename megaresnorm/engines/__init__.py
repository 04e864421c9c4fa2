"""Engines: each does exactly one optimizer step, behind one small interface."""
