"""Search channel factors of a scale group, and other remedies, by their error on calibration data."""
