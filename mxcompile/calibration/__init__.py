"""Calibration: run batches through a Program, collect statistics of its values, search and train on them."""
