"""Run calibration batches through a Program: at once, segment by segment, backward, beside the float model."""
