"""Memory layouts of packed weights, row-major and planar, and which weights are exact as FP8 operands."""
