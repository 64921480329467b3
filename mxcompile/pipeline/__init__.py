"""Passes in a fixed order, checked when built, watched by instruments while they run, resumable."""
