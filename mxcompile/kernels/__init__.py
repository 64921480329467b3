"""Fast implementations of `reference.py`, and which one serves a format, device and shape. No fx in here."""
