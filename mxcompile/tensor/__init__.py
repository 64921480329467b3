"""`MXWeight`, and operations on all tensors of a module."""
