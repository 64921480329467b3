"""Fast implementations of `reference.py`, and their selection by format, device and shape. Nothing here imports fx."""
