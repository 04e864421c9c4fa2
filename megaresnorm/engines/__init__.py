"""Engines do exactly one optimizer step, behind one small interface."""
