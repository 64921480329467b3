"""Pipelines: passes in a checked order, instruments around each pass, the text form, and resuming."""
