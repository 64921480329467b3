"""Tensors of a Program in training: distillation from the float model, learned rounding, by model or by segment."""
